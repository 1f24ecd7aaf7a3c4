"""What a directory that is no model's is told: what it holds instead, and what to give or do."""

import pytest

from placement.model.missing_files import FIX_PICKLES, Listing, missing_file, no_weights

HUB = "/cache/models--some--model"
SNAPSHOT = f"{HUB}/snapshots/0123"
FIX_EMPTY = "Give the directory that holds config.json and the safetensors files."


@pytest.mark.parametrize(
    ("name", "names", "folders", "expected"),
    [
        ("config.json", ["a.gguf", "b.gguf"], [],
         "/m has no config.json (it holds GGUF files: a.gguf, b.gguf). GGUF is not served: "
         "download the model's safetensors version."),
        ("config.json", ["pytorch_model.bin", "README.md"], [],
         f"/m has no config.json (it holds pickled weights: pytorch_model.bin). {FIX_PICKLES}"),
        ("config.json", ["adapter_config.json", "adapter_model.safetensors"], [],
         "/m has no config.json (it holds an adapter: adapter_config.json). "
         "Merge it into its base model first: model.merge_and_unload()."),
        ("config.json", ["llm", "vision"], ["/m/llm"],
         "/m has no config.json (it holds the model directory llm). Give /m/llm"),
        ("config.json", ["a", "b"], ["/m/a", "/m/b"],
         "/m has no config.json (it holds model directories: a, b). Give /m/a"),
        ("config.json", [], [], f"/m has no config.json (it is empty). {FIX_EMPTY}"),
        ("config.json", ["notes.txt"], [], "/m has no config.json. Download or export the model again."),
        ("config.json", ["config.json"], [],
         "/m has a link in place of config.json, to a file that is not there. Download or export the model again."),
        ("config.json", [f"{x}.safetensors" for x in "abcd"], [],
         "/m has no config.json (it holds safetensors files: a.safetensors, b.safetensors, c.safetensors, …). "
         "Download or export the model again."),
        ("tokenizer.json", ["tokenizer.model", "config.json"], [],
         "/m has no tokenizer.json (it holds tokenizer.model). Save the tokenizer as a fast one: "
         "AutoTokenizer.from_pretrained(path).save_pretrained(path)."),
        ("b.safetensors", ["a.safetensors", "b.safetensors"], [],
         "/m has a link in place of b.safetensors, to a file that is not there. "
         "Download or export the model again."),
    ],
)  # fmt: skip
def test_a_missing_file_is_named_with_what_there_is_instead(
    name: str, names: list[str], folders: list[str], expected: str
) -> None:
    error = missing_file(name, Listing(path="/m", names=names, model_folders=folders))
    assert str(error) == f"model.path: {expected}"


@pytest.mark.parametrize(
    ("listing", "expected"),
    [
        (Listing(path=HUB, names=["blobs", "refs", "snapshots"], model_folders=[SNAPSHOT]),
         f"{HUB} is a repository in the cache of Hugging Face, not a model directory. Give its snapshot: {SNAPSHOT}"),
        (Listing(path=f"{HUB}/snapshots", names=["0123"], model_folders=[SNAPSHOT]),
         f"{HUB}/snapshots holds the snapshots of a repository in the cache of Hugging Face, not a model directory. "
         f"Give its snapshot: {SNAPSHOT}"),
        (Listing(path=HUB, names=["snapshots"]),
         f"{HUB} is a repository in the cache of Hugging Face, and none of its snapshots has a config.json. "
         "Download or export the model again."),
        (Listing(path="/cache", names=["models--a--b", "version.txt"]),
         "/cache is the cache of Hugging Face, with models--a--b. "
         "Give a snapshot of one: /cache/models--a--b/snapshots/REVISION."),
    ],
)  # fmt: skip
def test_a_directory_of_the_cache_is_told_its_snapshot(listing: Listing, expected: str) -> None:
    assert str(missing_file("config.json", listing)) == f"model.path: {expected}"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_directory_with_pickles_alone_is_told_the_way_out(name: str) -> None:
    error = no_weights(Listing(path="/m", names=["config.json", name]))
    assert str(error) == (
        f"model.path: /m holds weights as pickles only ({name}), which can run code: none is loaded. {FIX_PICKLES}"
    )


@pytest.mark.parametrize(
    ("names", "held"),
    [(["config.json"], ""), (["x.gguf", "training_args.bin"], " (it holds GGUF files: x.gguf)")],
)
def test_a_directory_without_weights_lacks_the_single_file(names: list[str], held: str) -> None:
    assert no_weights(Listing(path="/m", names=names)).problem == f"/m has no model.safetensors{held}"


def test_a_machine_without_the_directory_says_so() -> None:
    error = missing_file("config.json", Listing(path="/m", exists=False))
    assert str(error) == (
        "model.path: /m is no directory of this machine. Put the model there: model.path is the same on all machines."
    )
