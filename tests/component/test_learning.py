"""What counts as a request, which of several variants is fetched, and what the library learns from how engines read;
on a real store, without a mount."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import trio

from instantstart_fs.catalog import loadsets
from instantstart_fs.catalog.loadset_learner import QUIET_SECONDS, LoadSetLearner
from instantstart_fs.catalog.model import Generation
from instantstart_fs.core.manifest import FileEntry, ModelSpec, PipelineSpec
from instantstart_fs.errors import UsageError, VariantNotChosen
from instantstart_fs.index.environment import Index
from instantstart_fs.index.schema import SummaryRecord
from instantstart_fs.library import Library
from instantstart_fs.upkeep.fsck import repair
from tests.component.test_library import MIB, find, read_all, running, spec, wait_state

pytestmark = pytest.mark.timeout(60)
SHARDS = ["Llama-Q8_0-00001-of-00002.gguf", "Llama-Q8_0-00002-of-00002.gguf"]
GGUFS = {
    "config.json": 10,
    "Llama-Q2_K.gguf": MIB,
    "Llama-Q4_K_M.gguf": 3 * MIB,
    **dict.fromkeys(SHARDS, 2 * MIB),
    "mmproj-F16.gguf": 2 * MIB,
}
TWINS = {"config.json": 10, "model.safetensors": 3 * MIB, "pytorch_model.bin": 3 * MIB, "README.md": 100}


def make(root: Path, files: dict[str, int]) -> Path:
    for path, size in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(os.urandom(size))
    return root


def states(library: Library, pipeline: str = "p") -> dict[str, str]:
    return {file.path: file.state for file in library.pipelines.status(pipeline).files or ()}


def here(library: Library, pipeline: str = "p") -> set[str]:
    return {path for path, state in states(library, pipeline).items() if state == "unverified"}


def fields(library: Library, name: str, pipeline: str = "p") -> dict[str, object]:
    return {
        file.path: getattr(file, name) for file in library.pipelines.status(pipeline).files or () if getattr(file, name)
    }


async def evicted_and_warmed(library: Library) -> set[str]:
    await library.admin.evict("p")
    assert here(library) == set()
    await library.warming.warm("p")
    await wait_state(library, "p", "unverified")
    return here(library)


# -- requests ----------------------------------------------------------------------------------------------------------


LARGE = 17 * MIB
WEIGHTS = (
    *("model.nemo", "model.onnx", "1/model.plan", "voices.npz", "model.ckpt", "model.pt2", "model.tflite"),
    *("ggml-base.ggml", "gemma.task", "model.bin", "model.onnx_data", "weights.unheard_of", "no-suffix", "model.json"),
    *("flow.pt", "voices/af.pt", "embeddings.vec", "lm.arpa", "x.gguf-split-a", "model.tar", "big.model"),
)
OTHERS = (
    *("config.json", "tokenizer.model", "tokenizer.model.v3", "merges.txt", "chat_template.jinja", "modeling.py"),
    *("config.pbtxt", "sentencepiece.bpe.model", "spiece.model", "README.md", "logo.png", "training_args.bin"),
    *("optimizer.pt", "model.safetensors.index.json", "model.onnx.json", "LICENSE", ".gitattributes", "prompt.wav"),
)


async def test_opening_weights_of_any_kind_is_a_request_and_a_cold_start(tmp_path: Path) -> None:
    async with running(tmp_path, keep_hot=3600) as library:
        for number, path in enumerate(WEIGHTS):
            size = LARGE if path in ("model.json", "big.model") else 2 * MIB
            source = make(tmp_path / f"source{number}", {path: 0, "vocabulary.json": 10, "tokens.txt": 10})
            os.truncate(source / path, size)
            pipeline = f"p{number}"
            await library.admin.add(spec(pipeline, source))
            for quiet in ("vocabulary.json", "tokens.txt"):
                await read_all(library, pipeline, quiet)
            assert library.pipelines.status(pipeline).last_request is None, path
            library.mounted.release(await library.mounted.open(find(library, pipeline, *path.split("/"))))
            status = library.pipelines.status(pipeline)
            assert status.last_request is not None and status.hot_until is not None, path
            assert [record.opened_files for record in library.cold_starts.of(pipeline)] == [1], path


async def test_reading_anything_else_is_none(tmp_path: Path) -> None:
    source = make(tmp_path / "source", {**dict.fromkeys(OTHERS, 2 * MIB), "a.safetensors": MIB})
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        for path in OTHERS:
            await read_all(library, "p", path)
            assert library.pipelines.status("p").last_request is None, path


# -- variants ----------------------------------------------------------------------------------------------------------


async def test_reading_one_variant_fetches_its_parts_and_projectors_and_no_other(tmp_path: Path) -> None:
    source = make(tmp_path / "source", GGUFS)
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        status = library.pipelines.status("p")
        assert (status.state, status.undecided) == ("cold", 3)
        handle = await library.mounted.open(find(library, "p", SHARDS[0]))
        await library.mounted.read_into(handle, MIB + 1, memoryview(bytearray(100)))
        library.mounted.release(handle)
        await wait_state(library, "p", "unverified")
        assert here(library) == {"config.json", "mmproj-F16.gguf", *SHARDS}
        assert library.pipelines.status("p").undecided is None
        # Another one is read through, and is not what the pipeline is made of before it is read to its end.
        handle = await library.mounted.open(find(library, "p", "Llama-Q2_K.gguf"))
        await library.mounted.read_into(handle, 0, memoryview(bytearray(100)))
        library.mounted.release(handle)
        assert (await evicted_and_warmed(library)) == {"config.json", "mmproj-F16.gguf", *SHARDS}
    async with running(tmp_path) as library:
        assert library.pipelines.status("p").state == "unverified"


async def test_looking_into_the_headers_of_variants_chooses_none(tmp_path: Path) -> None:
    source = make(tmp_path / "source", {path: max(size, 4 * MIB) for path, size in GGUFS.items()})
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        for path in GGUFS:
            handle = await library.mounted.open(find(library, "p", path))
            await library.mounted.read_into(handle, 0, memoryview(bytearray(4096)))
            library.mounted.release(handle)
        assert library.pipelines.status("p").undecided == 3


async def test_what_goes_with_any_variant_is_fetched_before_one_is_chosen_and_the_choice_is_still_open(
    tmp_path: Path,
) -> None:
    source = make(tmp_path / "source", GGUFS)
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        await read_all(library, "p", "mmproj-F16.gguf")
        with trio.fail_after(10):
            while here(library) != {"config.json", "mmproj-F16.gguf"} or library.pipelines.status("p").fill is not None:
                await library.pipelines.wait_changed("p", 0.1)
        assert (library.pipelines.status("p").state, library.pipelines.status("p").undecided) == ("partial", 3)
        assert library.catalog.pipelines["p"].current.reserved_bytes == 0  # type: ignore[union-attr]
        await read_all(library, "p", "Llama-Q2_K.gguf")
        await wait_state(library, "p", "unverified")
        assert here(library) == {"config.json", "mmproj-F16.gguf", "Llama-Q2_K.gguf"}


async def test_warm_asks_which_variant_and_takes_the_answer(tmp_path: Path) -> None:
    source = make(tmp_path / "source", GGUFS)
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        with pytest.raises(VariantNotChosen) as asked:
            await library.warming.warm("p")
        for expected in (
            "3 GGUF variants",
            "Q2_K",
            "Q4_K_M",
            "Q8_0",
            "`instantstart warm p --include '*Q4_K_M*'`",
            "--all",
        ):
            assert expected in asked.value.message
        assert here(library) <= {"config.json", "mmproj-F16.gguf"}
        assert library.pipelines.status("p").state != "unverified"
        with pytest.raises(UsageError, match="no file of p matches"):
            await library.warming.include("p", ["*Q9*"])
        await library.warming.include("p", ["*Q4_K_M*"])
        await library.warming.warm("p")
        await wait_state(library, "p", "unverified")
        assert here(library) == {"config.json", "mmproj-F16.gguf", "Llama-Q4_K_M.gguf"}
        chosen = {variant.label: variant.chosen for variant in library.pipelines.status("p").variants or ()}
        assert chosen == {"Q2_K": False, "Q4_K_M": True, "Q8_0": False}
        assert set(fields(library, "left_out")) == {"Llama-Q2_K.gguf", *SHARDS}


async def test_where_one_model_has_variants_the_others_are_warmed_and_the_question_names_it(tmp_path: Path) -> None:
    speech = make(tmp_path / "speech", {"config.json": 10, "model.safetensors": 3 * MIB})
    language = make(tmp_path / "language", GGUFS)
    models = (ModelSpec(f"file://{speech}", "asr"), ModelSpec(f"file://{language}", "llm"))
    async with running(tmp_path) as library:
        await library.admin.add(PipelineSpec(id="agent", models=models))
        with pytest.raises(VariantNotChosen, match="3 GGUF variants of its model llm"):
            await library.warming.warm("agent")
        with trio.fail_after(20):
            while "asr/model.safetensors" not in here(library, "agent"):
                await trio.sleep(0.01)
        assert library.pipelines.status("agent").state != "unverified"
        await library.warming.include("agent", ["*Q4_K_M*"])
        await library.warming.warm("agent")
        await wait_state(library, "agent", "unverified")


async def test_what_an_earlier_version_warmed_with_all_variants_stays_warm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadSetLearner, "begins_to_load", lambda *_: None)  # it knew neither
    monkeypatch.setattr(LoadSetLearner, "read_whole", lambda *_: None)
    source = make(tmp_path / "source", {**GGUFS, "README.md": 10})
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        for name in GGUFS:
            await read_all(library, "p", name)
        await wait_state(library, "p", "unverified")
        assert here(library) == set(GGUFS)
    for _ in range(2):
        async with running(tmp_path) as library:
            assert (library.pipelines.status("p").state, library.pipelines.status("p").undecided) == (
                "unverified",
                None,
            )
            await library.warming.warm("p")
            assert here(library) == set(GGUFS)


async def test_with_everything_here_nobody_has_to_choose(tmp_path: Path) -> None:
    source = make(tmp_path / "source", GGUFS)
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        await library.warming.warm("p", everything=True)
        await wait_state(library, "p", "unverified")
        assert here(library) == set(GGUFS)
        await library.warming.warm("p")


@pytest.mark.parametrize(("globs", "undecided"), [(["*Q4_K_M*"], None), (["*.gguf"], 3), (["*Q4*", "*Q2*"], None)])
async def test_include_at_add_chooses_where_a_glob_means_one_variant(
    tmp_path: Path, globs: list[str], undecided: int | None
) -> None:
    source = make(tmp_path / "source", GGUFS)
    async with running(tmp_path) as library:
        model = ModelSpec(source=f"file://{source}", include=tuple(globs))
        await library.admin.add(PipelineSpec(id="p", models=(model,)))
        assert library.pipelines.status("p").undecided == undecided


# -- learning ----------------------------------------------------------------------------------------------------------


async def test_what_an_engine_has_read_to_its_end_belongs_to_the_load_set(tmp_path: Path) -> None:
    source = make(tmp_path / "source", TWINS)
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        assert fields(library, "left_out")["pytorch_model.bin"] == "twin of model.safetensors"
        await read_all(library, "p", "config.json")
        await read_all(library, "p", "pytorch_model.bin")
        assert fields(library, "learned") == {"pytorch_model.bin": True}
        assert "pytorch_model.bin" in await evicted_and_warmed(library)
    async with running(tmp_path) as library:  # from the index
        assert "pytorch_model.bin" in await evicted_and_warmed(library)
        # In another revision, too.
        (source / "config.json").unlink()
        (source / "config.json").write_bytes(b"another")
        await library.admin.update("p")
        assert library.pipelines.status("p").generation == 2
        assert "pytorch_model.bin" in await evicted_and_warmed(library)
    shutil.rmtree(tmp_path / "store/index")
    report = repair(str(tmp_path / "store"), False, lambda progress: None)
    assert report.problems == ()
    async with running(tmp_path) as library:  # from the slot
        assert fields(library, "learned") == {"pytorch_model.bin": True}
        assert "pytorch_model.bin" in await evicted_and_warmed(library)


async def test_a_look_at_its_header_teaches_nothing(tmp_path: Path) -> None:
    source = make(tmp_path / "source", TWINS)
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        handle = await library.mounted.open(find(library, "p", "pytorch_model.bin"))
        await library.mounted.read_into(
            handle, 3 * MIB - 4096, memoryview(bytearray(4096))
        )  # a zip's directory is its end
        library.mounted.release(handle)
        assert fields(library, "learned") == {}


async def test_a_copy_of_everything_teaches_nothing(tmp_path: Path) -> None:
    for order, names in enumerate((sorted(TWINS), sorted(TWINS, reverse=True))):
        source = make(tmp_path / f"source{order}", TWINS)
        async with running(tmp_path / str(order)) as library:
            await library.admin.add(spec("p", source))
            for name in names:
                await read_all(library, "p", name)
            assert fields(library, "learned") == {}, names
            assert await evicted_and_warmed(library) == {"config.json", "model.safetensors"}


async def test_a_copy_of_all_variants_chooses_none_of_them(tmp_path: Path) -> None:
    source = make(tmp_path / "source", {**GGUFS, "README.md": 10})
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        for name in sorted(GGUFS):
            await read_all(library, "p", name)
        assert library.pipelines.status("p").undecided is None
        await read_all(library, "p", "README.md")
        assert library.catalog.pipelines["p"].learned.wanted == ()


async def test_the_order_of_first_opens_in_one_start_is_that_of_fetching_in_the_next(tmp_path: Path) -> None:
    names = [f"model-{number:05}-of-00004.safetensors" for number in range(1, 5)]
    seen = [names[2], names[0], names[3], names[1]]
    source = make(tmp_path / "source", {**dict.fromkeys(names, MIB), "config.json": 2})

    def order(library: Library) -> list[str]:
        generation = library.catalog.pipeline("p").current
        assert isinstance(generation, Generation)
        return [generation.manifest.files[index].path for index in generation.load_set]

    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        assert order(library) == ["config.json", *names]
        for name in [*seen, *names]:  # opened again in another order: the first opens count
            library.mounted.release(await library.mounted.open(find(library, "p", name)))
        library.learner.end_all()
        assert order(library) == ["config.json", *seen]
        await library.admin.evict("p")
        assert order(library) == ["config.json", *seen], "the next start fetches in it"
    async with running(tmp_path) as library:
        assert order(library) == ["config.json", *seen], "and so it does after a restart"


async def test_what_no_start_touches_is_said(tmp_path: Path) -> None:
    source = make(tmp_path / "source", {"a.safetensors": MIB, "b.safetensors": MIB, "config.json": 2})
    async with running(tmp_path) as library:
        now = [0.0]
        library.learner._clock = lambda: now[0]
        await library.admin.add(spec("p", source))
        for start in range(4):
            assert fields(library, "untouched") == ({} if start < 3 else {"b.safetensors": True}), start
            library.mounted.release(await library.mounted.open(find(library, "p", "a.safetensors")))
            now[0] += QUIET_SECONDS
            library.learner.end_all() if start == 2 else None
        library.mounted.release(await library.mounted.open(find(library, "p", "b.safetensors")))
        library.learner.end_all()
        assert fields(library, "untouched") == {}


async def test_a_summary_that_counts_another_load_set_is_not_believed(tmp_path: Path) -> None:
    """An earlier version called it warm, by rules that leave out what an engine opens."""
    source = make(tmp_path / "source", {"llm.pt": MIB, "blank/model.safetensors": MIB})
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        await read_all(library, "p", "blank", "model.safetensors")
        generation = library.catalog.pipelines["p"].current
        assert isinstance(generation, Generation)
        with trio.fail_after(10):
            while generation.files[0].target is not None:
                await trio.sleep(0.01)
        await library.residency.run_once()
        await library.residency.run_once()
    with Index.open(str(tmp_path / "store/index")) as index:
        found = dict(index.read(lambda txn: list(txn.summaries())))["p"]
        old = SummaryRecord(**{**msgspec.structs.asdict(found), "load_files": 1, "load_bytes": MIB, "rules": 0})
        index.write_sync(lambda txn: txn.put_summary("p", old))
    async with running(tmp_path) as library:
        assert library.pipelines.status("p").state == "partial"


async def test_what_cannot_be_written_down_is_known_and_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instantstart_fs.catalog.loadset_learner.RETRY_SECONDS", 0.01)
    source = make(tmp_path / "source", TWINS)
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        place = tmp_path / "store/slots/p/learned.json"
        place.mkdir()  # the slot takes none
        (place / "x").touch()
        await read_all(library, "p", "pytorch_model.bin")
        assert fields(library, "learned") == {"pytorch_model.bin": True}
        await trio.sleep(0.1)
        assert place.is_dir()
        shutil.rmtree(place)
        with trio.fail_after(10):
            while not place.is_file():
                await trio.sleep(0.01)


async def test_a_slot_that_an_earlier_version_has_written_to_is_asked(tmp_path: Path) -> None:
    """It writes the index's record of a pipeline without what it does not know."""
    source = make(tmp_path / "source", TWINS)
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        await library.warming.include("p", ["pytorch_model.bin"])
    with Index.open(str(tmp_path / "store/index")) as index:
        known = index.read(lambda txn: txn.get_upkeep("p"))
        assert known is not None and known.learned is not None
        index.write_sync(lambda txn: txn.put_upkeep("p", msgspec.structs.replace(known, learned=None)))
        index.write_sync(lambda txn: txn.delete_summary("p"))
    async with running(tmp_path) as library:
        assert fields(library, "learned") == {"pytorch_model.bin": True}
        assert "pytorch_model.bin" not in fields(library, "left_out")


async def test_globs_are_matched_while_others_are_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again, where an update came meanwhile: the numbers of the files are others then."""
    source = make(tmp_path / "source", GGUFS)
    seen: list[list[str]] = []
    begun, go_on = threading.Event(), threading.Event()

    def slow(pipeline: str, files: Sequence[FileEntry], globs: Sequence[str]) -> list[int]:
        seen.append([entry.path for entry in files])
        begun.set()
        assert go_on.wait(20)
        return included(pipeline, files, globs)

    included = loadsets.included
    monkeypatch.setattr(loadsets, "included", slow)
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(library.warming.include, "p", ["*Q4_K_M*"])
            with trio.fail_after(20):
                await trio.to_thread.run_sync(begun.wait)
                assert library.pipelines.status("p").state == "cold"
                make(source, {"A-new-one.json": 10})
                await library.admin.update("p")
            go_on.set()
        assert len(seen) == 2
        assert "A-new-one.json" in seen[1] and "A-new-one.json" not in seen[0]
        wanted = set(fields(library, "left_out"))
        assert wanted == {"Llama-Q2_K.gguf", *SHARDS}
