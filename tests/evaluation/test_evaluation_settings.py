"""Config file and prompts of `python -m rgtg_fast eval`: mistakes are said before models load."""

import json
import math
import shutil

import pytest
import torch
from lora_checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file
from tiny import gpt2_rm, tokenizer

from rgtg_fast.cli import main
from rgtg_fast.demo.run import ASSETS
from rgtg_fast.evaluation import check_settings
from rgtg_fast.evaluation.models import load_classifier
from rgtg_fast.evaluation.prompts import Prompt, check_lengths, load_prompts
from rgtg_fast.evaluation.scoring import Classifier, FunctionJudge

GUIDE, JUDGE = str(ASSETS / "rm_partial"), str(ASSETS / "rm_full")
PARGS = {"name": "pargs", "reward_model": GUIDE}
MINIMAL = {
    "model": str(ASSETS / "lm"),
    "prompts": str(ASSETS / "prompts.jsonl"),
    "judge": JUDGE,
    "output_dir": "o",
    "runs": [{"name": "base"}, PARGS],
}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def prefer(prompt, a, b):
    return 0.5


def test_a_minimal_config_compares_with_its_first_run():
    settings = check_settings(MINIMAL)
    assert settings.baseline == "base" and settings.seeds == (0,)
    assert [run.name for run in settings.runs] == ["base", "pargs"]


def test_lists_of_values_make_a_run_of_each():
    runs = check_settings(MINIMAL | {"runs": [PARGS | {"k": [4, 8], "beta": [1, 2]}]}).runs
    assert [(r.name, r.k, r.beta) for r in runs] == [
        ("pargs k=4 beta=1", 4, 1.0),
        ("pargs k=4 beta=2", 4, 2.0),
        ("pargs k=8 beta=1", 8, 1.0),
        ("pargs k=8 beta=2", 8, 2.0),
    ]


def run(**values):
    return {"runs": [{"name": "r"} | values]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"promts": "x"}, "unknown key promts: did you mean prompts?"),
        ({"seeds": 10**30}, "is how many; pass at most 10000"),
        ({"seeds": [2**70]}, "the seeds must differ and be 0 to"),
        ({"judge": None}, "lacks judge"),
        ({"limit": "many"}, "limit: 'many' is no int"),
        ({"limit": 2.5}, "limit: 2.5 is no int"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"confidence": 95}, "confidence=95"),
        ({"dtype": "fp16"}, "dtype='fp16'; write float32"),
        ({"seeds": "two"}, "seeds='two'"),
        ({"seeds": [1, 1]}, "must differ"),
        ({"baseline": "bsae"}, "baseline='bsae' is no run"),
        ({"runs": {"name": "base"}}, "must be a list"),
        ({"runs": [{"name": "base"}] * 2}, "same name base"),
        (run(name="a/b"), "run name 'a/b'"),
        (run(bta=1), "unknown key run r: bta: did you mean beta?"),
        (run(beta=2), "beta does nothing in an unguided run; set reward_model"),
        (run(reward_model=GUIDE, top_k=5), "top_k does nothing in a guided run"),
        (run(do_sample=False, temperature=0.5), "temperature does nothing in a greedy run"),
        (run(reward_model=GUIDE, k=65), "k=65; pass 1 to 64"),
        (run(reward_model=GUIDE, beta="big"), "beta: 'big' is no float"),
        (run(reward_model=GUIDE, kind="scalar"), "kind='scalar'; pass one of classifier"),
        (run(do_sample=[True, False]), "lists go with"),
        (run(temperature=0), "temperature=0.0; pass a number > 0"),
        (run(best_of=4), "best_of needs select_by"),
        (run(select_by=GUIDE), "select_by without best_of"),
        (run(reward_model="./nowhere"), "no model at './nowhere'"),
        ({"model": str(ASSETS)}, "holds no config.json"),
        ({"judge": "nowhere:f", "win_judge": "nowhere:f"}, "win_judge='nowhere:f' cannot be"),
        ({"win_judge": "json:nothing"}, "cannot be imported"),
        ({"win_judge": {"url": "http://x"}}, "needs model"),
        ({"win_judge": {"url": "x", "modl": "m"}}, "win_judge: modl: did you mean model?"),
        ({"win_judge": {"url": "http://x", "model": "m", "template": "{a}{b}"}}, "lacks {prompt}"),
        ({"win_judge": {"url": "http://x", "model": "m", "key_env": "NO_K"}}, "has no NO_K"),
        ({"win_judge": {}}, "needs either function"),
        ({"win_judge": {"url": "http://me:key@x/v1", "model": "m"}}, "must not hold a user, key"),
        ({"win_judge": {"url": "http://x/v1?key=1", "model": "m"}}, "must not hold a user, key"),
    ],
)
def test_mistakes_in_the_config_are_named(values, message):
    with pytest.raises(ValueError) as error:
        check_settings(MINIMAL | values)
    assert message in str(error.value)


def test_a_judge_that_guides_is_an_error_and_a_warning_on_demand():
    values = MINIMAL | {"judge": GUIDE + "/"}
    with pytest.raises(ValueError, match=r"reward_model of run pargs.*allow_same_judge"):
        check_settings(values)
    with pytest.warns(UserWarning, match="proxy rewards"):
        check_settings(values | {"allow_same_judge": True})


def test_a_copy_of_the_guide_is_the_guide(tmp_path):
    shutil.copytree(GUIDE, tmp_path / "rm")
    with pytest.raises(ValueError, match="also the select_by of run best"):
        best = {"name": "best", "best_of": 2, "select_by": GUIDE}
        check_settings(MINIMAL | {"judge": str(tmp_path / "rm"), "runs": [best]})


@pytest.fixture
def no_models(monkeypatch):
    """Loading weights fails the test, and the hub has nothing."""

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    def absent(name, file):
        raise FileNotFoundError(f"{name}/{file} not found here")

    monkeypatch.setattr("rgtg_fast.evaluation.models.load_model", load)
    monkeypatch.setattr("rgtg_fast.evaluation.models.hf_hub_download", absent)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"judge": str(ASSETS / "lm")}, "LlamaForCausalLM with .* labels; pass a sequence"),
        ({"judge": "math:nothing"}, "judge='math:nothing' cannot be imported"),
        (run(reward_model=str(ASSETS / "lm")), "run r: reward_model=.*LlamaForCausalLM"),
        (run(reward_model=GUIDE, kind="head"), "no reward_head.safetensors"),
        ({"prompts": "none.jsonl"}, "no file at 'none.jsonl'"),
        ({"max_new_tokens": 250}, "250 makes .* but the model has 256 positions"),
        ({"device": "gpu"}, "device='gpu'; write auto"),
        ({"tokenizer": "./nowhere"}, "the tokenizer of './nowhere' cannot be loaded"),
        ({"model": "nowhere"}, "model: there is no folder 'nowhere'.*not found here"),
        ({"judge": "nowhere"}, "judge: there is no folder 'nowhere'"),
        (run(reward_model="nowhere"), "run r: reward_model: there is no folder 'nowhere'"),
        (run(best_of=2, select_by="nowhere"), "run r: select_by: there is no folder 'nowhere'"),
        ({"output_dir": str(ASSETS / "prompts.jsonl"), "runs": [{"name": "r"}]}, "directory"),
    ],
)
def test_the_command_line_ends_with_the_message(values, message, tmp_path, no_models):
    (tmp_path / "cfg.yaml").write_text(json.dumps(MINIMAL | values))
    with pytest.raises(SystemExit, match=f"eval: .*{message}"):
        main(["eval", "--config", str(tmp_path / "cfg.yaml")])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('["a"]', "line 2 has no prompt"),
        ('{"promt": "a"}', "line 2 has no prompt"),
        ('{"prompt": ""}', "line 2: the prompt is empty"),
        (r'{"prompt": "a \ud800"}', "line 2: the prompt has half of a surrogate pair"),
        ('{"prompt": [{"role": "user", "content": "a"}]}', "line 2 is a conversation but"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_named_by_its_line(line, message, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "hello"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        load_prompts(str(path), tokenizer())


def test_a_prompts_file_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes('{"prompt": "grün"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"p.jsonl is not UTF-8"):
        load_prompts(str(path), tokenizer())


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_prompts(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "hello"}\r\n{"prompt": "world"}\r\n')
    assert [p.text for p in load_prompts(str(path), tokenizer())] == ["hello", "world"]


def test_a_conversation_that_the_template_refuses_is_named_by_its_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": [{"role": "system", "content": "a"}]}\n')
    tok = tokenizer().__class__.from_pretrained(_saved(tmp_path))
    tok.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match=r"line 1: the chat template refuses it .no system role"):
        load_prompts(str(path), tok)


def test_a_prompt_that_fills_the_model_asks_for_a_shorter_one():
    config = gpt2_rm().config
    full = [Prompt("a", "a", [5] * 64)]
    with pytest.raises(ValueError, match="the model has 64 positions; pass shorter prompts"):
        check_lengths(full, config, 8)


def test_a_file_without_prompts_is_an_error(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no prompts"):
        load_prompts(str(path), tokenizer())


@pytest.fixture
def conversation(tmp_path):
    path = tmp_path / "p.jsonl"
    messages = [{"role": "user", "content": "hello world"}]
    path.write_text(json.dumps({"prompt": messages, "chosen": "x"}) + "\n")
    tok = tokenizer().__class__.from_pretrained(_saved(tmp_path))
    tok.chat_template = TEMPLATE
    return load_prompts(str(path), tok)[0], tok


def _saved(folder):
    tokenizer().save_pretrained(folder / "tok")
    return folder / "tok"


def test_conversations_go_through_the_chat_template(conversation):
    prompt, tok = conversation
    assert prompt.text == "<user>hello world<assistant>"
    assert tok.decode(prompt.ids) == prompt.text


def test_a_judge_with_its_own_template_sees_the_conversation_in_it(conversation):
    prompt, tok = conversation
    own = tok.__class__.from_pretrained(tok.name_or_path)
    own.chat_template = TEMPLATE.replace("<", "[").replace(">", "]")
    judge = Classifier(gpt2_rm(), own, tok, batch_size=4)
    answer = {"text": "thank you", "ids": tok("thank you")["input_ids"], "end": tok.eos_token_id}
    assert own.decode(judge._ids(prompt, answer)) == "[user]hello world[assistant]thank you"
    own.chat_template = TEMPLATE
    assert judge._ids(prompt, answer) == [*prompt.ids, *answer["ids"], tok.eos_token_id]


@torch.no_grad()
def test_a_judge_without_padding_token_judges_rows_alone(conversation):
    prompt, tok = conversation
    rm = gpt2_rm()
    answers = [{"text": "", "ids": ids, "end": None} for ids in ([5, 6], [7], [8, 9, 10])]
    padded = Classifier(rm, tok, tok, batch_size=4).score([prompt] * 3, answers)
    rm.config.pad_token_id = None
    alone = Classifier(rm, tok, tok, batch_size=4)
    assert alone.batch_size == 1
    assert alone.score([prompt] * 3, answers) == pytest.approx(padded, abs=1e-5)


def test_a_text_too_long_for_the_judge_is_an_error(conversation):
    prompt, tok = conversation
    judge = Classifier(gpt2_rm(), tok, tok, batch_size=4)
    answer = {"text": "", "ids": [5] * 500, "end": None}
    with pytest.raises(ValueError, match="for the judge, which has 64 positions"):
        judge.score([prompt], [answer])


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_reward_that_is_no_number_is_an_error(value, conversation):
    prompt, tok = conversation
    judge = FunctionJudge(lambda prompt, answer, finished: value, "mine:f")
    answer = {"text": "", "ids": [5], "end": None}
    with pytest.raises(ValueError, match=f"mine:f gave {value} for an answer to the prompt"):
        judge.score([prompt], [answer])
    rm = gpt2_rm()
    torch.nn.init.constant_(rm.score.weight, value)
    with pytest.raises(ValueError, match="the classifier gave nan"):
        Classifier(rm, tok, tok, batch_size=4).score([prompt], [answer])


def test_a_reward_model_with_several_labels_is_an_error(tmp_path):
    gpt2_rm(num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gives 3 labels; pass a model with one"):
        load_classifier(str(tmp_path), check_settings(MINIMAL))


@pytest.fixture
def adapter(tmp_path):
    make_checkpoint(tmp_path / "rm")[1].save_pretrained(tmp_path / "base")
    change_config(tmp_path / "rm", str(tmp_path / "base"))
    return tmp_path / "rm"


def change_config(folder, base):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))


def test_an_adapter_whose_base_has_moved_names_it(adapter):
    change_config(adapter, "/gone/base")
    with pytest.raises(ValueError, match=r"rm' is an adapter and its base model '/gone/base'"):
        load_classifier(str(adapter), check_settings(MINIMAL))


@pytest.mark.parametrize(
    ("part", "message"), [("lora_B", "lacks .*lora_B"), ("score", "cannot be loaded .*score")]
)
def test_an_adapter_that_lacks_weights_is_an_error(adapter, part, message):
    settings, file = check_settings(MINIMAL), adapter / "adapter_model.safetensors"
    assert load_classifier(str(adapter), settings).config.num_labels == 1
    save_file({k: v for k, v in load_file(file).items() if part not in k}, file)
    with pytest.raises(ValueError, match=message):
        load_classifier(str(adapter), settings)
