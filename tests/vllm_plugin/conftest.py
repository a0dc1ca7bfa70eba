import pytest
import tiny


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Tiny reward models by name: each a folder that `from_pretrained` loads, and the model."""
    made = {
        "llama": tiny.llama_rm(),
        "gpt2": tiny.gpt2_rm(),
        "policy": tiny.llama_lm(seed=11),
        "reference": tiny.llama_lm(seed=12),
    }
    folders = {}
    for name, model in made.items():
        folder = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(folder)
        folders[name] = str(folder), model
    return folders
