"""The teacher's signals on disk: what was written comes back, whatever wrote it, and what does not fit is refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
import torch
from safetensors import safe_open
from training_models import VOCAB, model, packed

from edgedistill.errors import UserError
from edgedistill.losses.losses import Head, LossSpec, SparseTargets, TeacherHead, TeacherLogits, head_loss
from edgedistill.signals import cache
from edgedistill.signals.cache import KINDS, build_cache, sample_multisets
from edgedistill.signals.cache_files import cache_exists
from edgedistill.signals.cache_reader import open_cache
from edgedistill.signals.signals import LiveSignals, produce_from

KEY = {"teacher": "abc", "temperature": 2.0, "tokenizer": "def"}
DRAWS, TOP_K, TEMPERATURE = 50, 5, 2.0


def produce():
    return produce_from(LiveSignals(model(seed=5, hidden=48), low_precision=False), packed(), documents=False)


def build(folder, kind, key=KEY, **changes):
    data = packed()
    asked = {
        "key": key, "kind": kind, "vocab": VOCAB, "sequences": data.sequences, "context": data.context,
        "temperature": TEMPERATURE, "draws": DRAWS, "top_k": TOP_K, "seed": 3, "batch_sequences": 8,
    }  # fmt: skip
    build_cache(str(folder), **{"produce": changes.pop("produce", None) or produce(), **asked, **changes})


def head():
    return LiveSignals(model(seed=5, hidden=48), low_precision=False).head()


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(cache, "SHARD_BYTES", 10_000)


def exact(rows):
    ids = torch.from_numpy(packed().sequence_ids(rows)[:, :-1])
    with torch.no_grad():
        return model(seed=5, hidden=48)(ids).logits.flatten(0, 1)


ROWS = np.array([17, 0, 148, 3])


def test_hidden_states_give_the_exact_logits(tmp_path, small_shards):
    build(tmp_path / "c", "hidden")
    got = open_cache(str(tmp_path / "c"), key=KEY, head=head()).batch(ROWS)
    assert isinstance(got, TeacherHead)
    logits = got.hidden.float() @ got.head.weight.T
    torch.testing.assert_close(logits, exact(ROWS), rtol=0.02, atol=0.02)


def test_dense_logits(tmp_path, small_shards):
    build(tmp_path / "c", "dense")
    got = open_cache(str(tmp_path / "c"), key=KEY).batch(ROWS)
    assert isinstance(got, TeacherLogits)
    torch.testing.assert_close(got.logits.float(), exact(ROWS), rtol=0.02, atol=0.02)


def test_top_k_keeps_the_largest_and_the_tail(tmp_path, small_shards):
    build(tmp_path / "c", "topk")
    got = open_cache(str(tmp_path / "c"), key=KEY).batch(ROWS)
    assert isinstance(got, SparseTargets)
    p = torch.softmax(exact(ROWS) / TEMPERATURE, -1)
    torch.testing.assert_close(got.weights, p.gather(-1, got.ids), rtol=0.02, atol=1e-3)
    torch.testing.assert_close(got.weights.sum(-1) + got.tail, torch.ones(len(got.ids)), rtol=0, atol=1e-6)
    assert (got.weights.min(-1).values >= p.sort(-1, descending=True).values[:, TOP_K] - 1e-3).all()


def test_samples_follow_the_teacher_at_the_temperature(tmp_path, small_shards):
    """Over all tokens: the mean of the sampled probabilities is the teacher's, and the entropy kept is its own."""
    build(tmp_path / "c", "sampled")
    reader = open_cache(str(tmp_path / "c"), key=KEY)
    rows = np.arange(packed().sequences)
    got = reader.batch(rows)
    p = torch.softmax(exact(rows) / TEMPERATURE, -1)
    dense = torch.zeros_like(p).scatter_add_(-1, got.ids, got.weights)
    torch.testing.assert_close(got.weights.sum(-1), torch.ones(len(p)), rtol=0, atol=1e-6)
    # each entry is a mean of 50 draws with variance p(1−p)/50: compare sums over tokens, in standard deviations
    deviation = (dense - p).sum(0) / ((p * (1 - p)).sum(0) / DRAWS).sqrt()
    assert deviation.abs().max() < 4.5
    assert 0.7 < (((dense - p) ** 2).sum() / ((p * (1 - p)).sum() / DRAWS)) < 1.3
    entropy = -(p * p.log()).sum(-1)
    assert got.entropy.mean().item() == pytest.approx(entropy.mean().item(), rel=1e-3)
    assert reader.bytes_per_token < 60


@pytest.mark.parametrize(
    ("kind", "loss"),
    [("hidden", "forward_kl"), ("hidden", "jsd"), ("dense", "forward_kl"), ("dense", "jsd"), ("topk", "forward_kl")],
)
def test_a_temperature_in_the_loss_is_that_of_the_live_teacher(tmp_path, kind, loss):
    """Kept logits and states are at T = 1, kept probabilities at the loss's; all give its gradient at T = 2."""
    spec = LossSpec({loss: 1.0}, temperature=TEMPERATURE, vocab=VOCAB)
    build(tmp_path / "c", kind, top_k=VOCAB)
    kept = open_cache(str(tmp_path / "c"), key=KEY, head=head()).batch(ROWS)
    ids = torch.from_numpy(packed().sequence_ids(ROWS))
    live = LiveSignals(model(seed=5, hidden=48), low_precision=False).batch(ROWS, ids[:, :-1])
    student = Head(model(seed=9).get_output_embeddings().weight.detach())

    def of(teacher, temperature=TEMPERATURE):
        hidden = torch.randn(len(ROWS) * 16, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        chosen = dataclasses.replace(spec, temperature=temperature)
        value, _ = head_loss(
            20 * hidden, student, teacher, ids[:, 1:].reshape(-1), chosen, valid_total=64, low_precision=False
        )
        value.backward()
        return value.item(), hidden.grad

    value, gradient = of(live)
    got, found = of(kept)
    assert got == pytest.approx(value, rel=5e-3)
    assert ((found - gradient).norm() / gradient.norm()) < 0.01
    _, other = of(kept if kind != "topk" else live, 1.0)
    assert ((other - gradient).norm() / gradient.norm()) > 0.1


def test_inverting_the_distribution_draws_what_it_says():
    """Against the draws taken one by one; ends of the distribution included."""
    g = torch.Generator().manual_seed(0)
    p = torch.softmax(3 * torch.randn(40, 30, generator=g), -1)
    p[0] = 0
    p[0, 7] = 1
    uniform = torch.rand(40, 20, generator=g, dtype=torch.float64)
    uniform[1, :2] = torch.tensor([0.0, 1.0 - 1e-16], dtype=torch.float64)
    ids, counts = sample_multisets(p, uniform)
    for row in range(40):
        levels = np.cumsum(p[row].double().numpy())
        drawn = np.minimum(np.searchsorted(levels, uniform[row].numpy() * levels[-1], side="right"), 29)
        values, times = np.unique(drawn, return_counts=True)
        k = len(values)
        assert ids[row, :k].tolist() == values.tolist()
        assert counts[row, :k].tolist() == times.tolist()
        assert counts[row, k:].sum() == 0
        assert all(p[row, value] > 0 for value in values)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_write_the_same_bytes_as_one_process(tmp_path, kind, small_shards):
    build(tmp_path / "one", kind)
    barrier = threading.Barrier(3)
    given = produce()  # once: building a model draws from torch's one random state

    def write(rank):
        build(tmp_path / "three", kind, produce=given, rank=rank, world=3, barrier=barrier.wait)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(3)))
    one, three = (sorted(p for p in (tmp_path / name).iterdir()) for name in ("one", "three"))
    assert [p.name for p in one] == [p.name for p in three]
    assert len([p for p in one if p.name.startswith("shard")]) > 2
    for a, b in zip(one, three, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_ranks_run_a_sharded_teacher_together_to_the_end(tmp_path, small_shards):
    """A sharded teacher's pass gathers its weights from every rank: one that is called alone waits for ever."""
    build(tmp_path / "one", "hidden")
    (tmp_path / "three").mkdir()
    for name in ("shard-00000.safetensors", "shard-00002.safetensors"):  # of an earlier try
        shutil.copy(tmp_path / "one" / name, tmp_path / "three" / name)
    (tmp_path / "three" / "building.json").write_text(json.dumps(KEY, sort_keys=True))
    barrier, gather, given = threading.Barrier(3, timeout=120), threading.Barrier(3, timeout=120), produce()

    def collective(rows):
        gather.wait()
        return given(rows)

    def write(rank):
        build(tmp_path / "three", "hidden", produce=collective, rank=rank, world=3, barrier=barrier.wait)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(3)))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "three" / path.name).read_bytes()


def test_a_build_that_was_killed_goes_on_with_its_whole_shards(tmp_path, small_shards):
    made = []
    original = produce()

    def dying(rows):
        made.append(rows.tolist())
        if len(made) == 6:
            raise KeyboardInterrupt
        return original(rows)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "c", "hidden", produce=dying)
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "c").glob("shard*")}
    assert kept
    assert not (tmp_path / "c" / "cache.json").exists()
    with pytest.raises(UserError, match="unfinished cache of other signals"):
        build(tmp_path / "c", "hidden", key={**KEY, "teacher": "other"})
    build(tmp_path / "c", "hidden")
    assert all((tmp_path / "c" / name).stat().st_mtime_ns == stamp for name, stamp in kept.items())
    build(tmp_path / "d", "hidden")
    for path in (tmp_path / "d").glob("shard*"):
        assert path.read_bytes() == (tmp_path / "c" / path.name).read_bytes()


def test_another_key_is_refused_with_what_differs(tmp_path):
    build(tmp_path / "c", "sampled")
    with pytest.raises(
        UserError, match=r"temperature is 2.0 there and 1.0 here; tokenizer is 'def' there and 'x' here"
    ):
        open_cache(str(tmp_path / "c"), key={**KEY, "temperature": 1.0, "tokenizer": "x"})


def test_truncated_changed_and_missing_shards_are_refused(tmp_path, small_shards):
    build(tmp_path / "good", "sampled")
    names = sorted(p.name for p in (tmp_path / "good").glob("shard*"))

    def copy(name):
        shutil.copytree(tmp_path / "good", tmp_path / name)
        return tmp_path / name

    cut = copy("cut") / names[0]
    cut.write_bytes(cut.read_bytes()[:-8])
    (copy("gone") / names[-1]).unlink()
    flipped = copy("flipped") / names[0]
    flipped.write_bytes(flipped.read_bytes()[:-1] + bytes([flipped.read_bytes()[-1] ^ 1]))
    for name, match in (("cut", "bytes, not"), ("gone", "is missing")):
        with pytest.raises(UserError, match=match):
            open_cache(str(tmp_path / name), key=KEY)
    open_cache(str(tmp_path / "flipped"), key=KEY)
    with pytest.raises(UserError, match="is changed"):
        open_cache(str(tmp_path / "flipped"), key=KEY, verify=True)
    with pytest.raises(UserError, match="there is no cache"):
        open_cache(str(tmp_path / "nowhere"), key=KEY)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda r: r.update(schema="edgedistill.signal-cache/9"), "its schema is"),
        (lambda r: r["shards"][0].update(name="../../etc/passwd.safetensors"), "outside of its folder"),
        (lambda r: r.update(vocab=-1), "sizes are wrong"),
        (lambda r: r["shards"].pop(), "it has"),
        (lambda r: r.update(kind="pickle"), "sizes are wrong"),
        (lambda r: r.pop("key"), "key"),
    ],
)
def test_a_hostile_record_is_refused(tmp_path, change, match):
    build(tmp_path / "c", "hidden")
    record = json.loads((tmp_path / "c" / "cache.json").read_text())
    change(record)
    (tmp_path / "c" / "cache.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=match):
        open_cache(str(tmp_path / "c"), key=KEY, head=head())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda h: h["words"].update(data_offsets=[0, 1 << 50], shape=[(1 << 50) // 8]), "overlaps 'words'"),
        (lambda h: h["words"].update(shape=[3]), r"'words' of shape \[3\]"),
        (lambda h: h["entropy"].update(shape=[-1]), "not whole numbers"),
        (lambda h: h["first_bit"].update(dtype="OBJECT"), "OBJECT"),
        (lambda h: h.pop("words"), "does not begin where"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, change, match):
    build(tmp_path / "c", "sampled")
    path = next((tmp_path / "c").glob("shard*"))
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    made = struct.pack("<Q", len(text)) + text + raw[8 + length :]
    path.write_bytes(made)
    record = json.loads((tmp_path / "c" / "cache.json").read_text())
    record["shards"][0]["bytes"] = len(made)
    (tmp_path / "c" / "cache.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=match):
        open_cache(str(tmp_path / "c"), key=KEY).batch(np.array([0]))


def test_damaged_places_are_refused(tmp_path):
    build(tmp_path / "c", "sampled")
    path = next((tmp_path / "c").glob("shard*"))
    with safe_open(path, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["first_bit"] = tensors["first_bit"] * 1000
    from safetensors.numpy import save_file

    save_file(tensors, path)
    record = json.loads((tmp_path / "c" / "cache.json").read_text())
    record["shards"][0]["bytes"] = path.stat().st_size
    (tmp_path / "c" / "cache.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="outside of its shard"):
        open_cache(str(tmp_path / "c"), key=KEY).batch(np.array([5]))


def test_chosen_layers_and_attention_maps_are_kept(tmp_path, small_shards):
    teacher = model(seed=5, hidden=48)
    given = produce_from(
        LiveSignals(teacher, low_precision=False), packed(), documents=False, hidden_layers=[0, 1], attention_layers=[1]
    )
    build(tmp_path / "c", "hidden", produce=given, hidden_layers=[0, 1], attention_layers=[1])
    reader = open_cache(str(tmp_path / "c"), key=KEY, head=head())
    ids = torch.from_numpy(packed().sequence_ids(ROWS)[:, :-1])
    with torch.no_grad():
        out = teacher(ids, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(reader.layer("hidden.1", ROWS).float(), out.hidden_states[1], rtol=0.02, atol=0.02)
    torch.testing.assert_close(reader.layer("attention.1", ROWS).float(), out.attentions[1], rtol=0.02, atol=0.02)
    with pytest.raises(UserError, match=r"holds no hidden\.2"):
        reader.layer("hidden.2", ROWS)
    with pytest.raises(UserError, match="names layer 9, and the teacher has 2"):
        produce_from(LiveSignals(teacher, low_precision=False), packed(), documents=False, hidden_layers=[9])(ROWS)


def test_a_url_is_built_and_read_through_fsspec(tmp_path, small_shards):
    url = f"memory://signals-{os.getpid()}"
    build(url, "sampled", local=tmp_path / "staged")
    build(tmp_path / "plain", "sampled")
    reader = open_cache(url, key=KEY, local=tmp_path / "elsewhere")
    here = open_cache(str(tmp_path / "plain"), key=KEY)
    assert torch.equal(reader.batch(ROWS).ids, here.batch(ROWS).ids)
    assert cache_exists(url)
    assert not cache_exists(url + "-not")
    with pytest.raises(UserError, match="no cache of teacher signals"):
        open_cache(url + "-not", key=KEY, local=tmp_path / "elsewhere")
    victim = next((tmp_path / "elsewhere").rglob("shard*"))
    victim.write_bytes(b"torn")
    again = open_cache(url, key=KEY, local=tmp_path / "elsewhere")
    assert torch.equal(again.batch(ROWS).weights, here.batch(ROWS).weights)


def test_a_url_that_was_emptied_is_built_anew_whatever_lies_staged(tmp_path, small_shards):
    url, other = f"memory://again-{os.getpid()}", {**KEY, "temperature": 1.0}
    build(url, "sampled", local=tmp_path)
    files, path = fsspec.core.url_to_fs(url)
    files.rm(path, recursive=True)
    build(url, "sampled", key=other, temperature=1.0, local=tmp_path)
    build(tmp_path / "plain", "sampled", key=other, temperature=1.0)
    for shard in (tmp_path / "plain").glob("shard*"):
        assert files.cat_file(f"{path}/{shard.name}") == shard.read_bytes()


def test_a_full_disk_says_so_and_keeps_what_was_written(tmp_path, small_shards, monkeypatch):
    original = cache.save_file
    written = []

    def full(tensors, path):
        if len(written) == 2:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        original(tensors, path)

    monkeypatch.setattr(cache, "save_file", full)
    with pytest.raises(UserError, match=r"bytes at .*are free"):
        build(tmp_path / "c", "hidden")
    assert len(list((tmp_path / "c").glob("shard*.safetensors"))) == 2
    assert not list((tmp_path / "c").glob("*.tmp"))
    with pytest.raises(UserError, match=r"choose distill\.cache\.kind=sampled"):
        cache._require_room(tmp_path, 1 << 60)
