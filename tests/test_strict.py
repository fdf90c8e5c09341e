"""What comes from outside is read once, strictly and with bounds: files, JSON, YAML, safetensors headers."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.config.strict_yaml import dump_yaml, parse_yaml, read_yaml
from edgedistill.errors import UserError
from edgedistill.models.safetensors_header import BITS, read_safetensors_header
from edgedistill.strict import (
    NotJson,
    compiled_pattern,
    local_path,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    shown,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


class TestFiles:
    @pytest.mark.parametrize("kind", ["fifo", "folder", "device", "socket", "dangling", "loop", "missing", "through"])
    def test_what_is_no_regular_file_is_refused_at_once(self, tmp_path, kind):
        path = tmp_path / "config.json"
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(str(path))
        elif kind == "dangling":
            path.symlink_to(tmp_path / "nothing")
        elif kind == "loop":
            path.symlink_to(path)
        elif kind == "through":
            (tmp_path / "file").write_text("x")
            path = tmp_path / "file" / "config.json"
        begun = time.process_time()
        with pytest.raises(UserError) as error:
            read_json(path, what="config.json")
        assert time.process_time() - begun < 1
        assert str(path) in error.value.cause and error.value.remedy

    def test_a_link_to_a_file_is_that_file(self, tmp_path):
        (tmp_path / "there").write_text('{"a": 1}')
        (tmp_path / "here").symlink_to(tmp_path / "there")
        assert read_json(tmp_path / "here", what="config.json") == {"a": 1}

    def test_size_is_bounded_even_where_the_system_does_not_tell_it(self, tmp_path):
        (tmp_path / "large").write_bytes(b"x" * 11)
        with pytest.raises(UserError, match="11 bytes"):
            read_bytes(tmp_path / "large", what="file", max_bytes=10)
        with pytest.raises(UserError, match="11 bytes"):  # /proc files say that they have none
            read_bytes(local_path("/proc/self/status", what="file"), what="file", max_bytes=10)

    @pytest.mark.parametrize("text", ["a\0b", "x" * 300, "y/" * 3000, "\udcff", "~nobody-there-at-all/x"])
    def test_paths_that_no_system_call_takes(self, text):
        with pytest.raises(UserError) as error:
            local_path(text, what="data")
        assert len(error.value.cause) < 300 and error.value.cause.isprintable()

    def test_opened_without_waiting(self, tmp_path):
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(UserError, match="FIFO"), open_regular(tmp_path / "fifo", what="data"):
            pass


class TestJson:
    @settings(deadline=None)
    @given(VALUES)
    def test_honest_json_reads_as_it_is(self, value):
        for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
            assert parse_json(text.encode()) == value == json.loads(text)

    @pytest.mark.parametrize(
        ("raw", "why"),
        [
            (b'{"a": 1, "a": 1}', "'a' appears twice"),
            (b'[{"b": {"a": 1, "\\u0061": 2}}]', "'a' appears twice"),
            (b"[NaN]", "NaN is not a number"),
            (b"[-Infinity]", "Infinity is not a number"),
            (b"[1e999]", "beyond what a double holds"),
            (b"[" + b"1" * 5000 + b"]", "a number of 5,000 digits"),
            (b"[-" + b"1" * 101 + b"]", "a number of"),
            (b"[0." + b"1" * 5000 + b"]", "beyond"),
            (b"[" * 65 + b"]" * 65, "nested more than 64"),
            (b"[" * 100_000 + b"]" * 100_000, "nested more than 64"),
            (b"[" * 100_000, "nested more than 64"),
            (b'{"a":' * 100_000, "nested more than 64"),
            (b'["\\"' + b'[",[' * 100_000, "nested more than 64"),
            (b"\xef\xbb\xbf{}", "byte order mark"),
            ("{}".encode("utf-16"), "UTF-16"),
            (b'"\xff"', "byte 1 is 0xff"),
            (b'"\xed\xa0\x80"', "not UTF-8"),
            (b'"\\ud800"', "half of a surrogate pair"),
            (b'"\\ud83d\\ude00\\udc00"', "half of a surrogate pair"),
            (b'"a\x00b"', "line 1, column 3"),
            (b"{'a': 1}", "not JSON"),
            (b"{} {}", "not JSON"),
            (b"", "not JSON"),
            (b"[1,]", "not JSON"),
        ],
    )
    def test_refused(self, raw, why):
        begun = time.process_time()
        with pytest.raises(NotJson) as error:
            parse_json(raw)
        assert why in str(error.value)
        assert len(str(error.value)) < 300 and time.process_time() - begun < 1

    @pytest.mark.parametrize(
        "text",
        [
            "[" * 64 + "]" * 64,
            '{"a": ["[[[[[[", "{{{{{{", "\\"[[[[", "\\\\", "]]]]\\\\\\"{{{{"]}' + " " * 9,
            json.dumps({str(i): ["[{" * i, '"' * i, "\\" * i] for i in range(200)}),
            '"\\ud83d\\ude00 \\\\ud800"',
            "[" + ", ".join(['{"a": [[], {}]}'] * 500) + "]",
        ],
    )
    def test_depth_counts_no_text(self, text):
        assert parse_json(text) == json.loads(text)

    def test_a_large_tokenizer_is_not_much_slower_than_json_itself(self):
        vocab = {f'token {i} ["{chr(97 + i % 26)}': i for i in range(20_000)}
        raw = json.dumps({"model": {"vocab": vocab, "merges": [["a", f"b{i}"] for i in range(20_000)]}}).encode()

        def seconds(read):
            begun = time.process_time()
            read(raw)
            return time.process_time() - begun

        assert min(seconds(parse_json) for _ in range(3)) < 4 * min(seconds(json.loads) for _ in range(3)) + 0.05

    def test_an_object_is_asked_for(self, tmp_path):
        (tmp_path / "config.json").write_text("[1]")
        with pytest.raises(UserError, match="holds a list"):
            read_json(tmp_path / "config.json", what="config.json")


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("yes", "yes"), ("no", "no"), ("on", "on"), ("Off", "Off"), ("y", "y"), ("1:30", "1:30"),
            ("2024-01-01", "2024-01-01"), ("1_000", 1000), ("60_000", 60000), ("0x1F", 31), ("0o17", 15),
            ("0b11", "0b11"), ("1e-3", 1e-3), ("1.5", 1.5), (".5", 0.5), ("5.", 5.0), ("+3", 3), ("-0", 0),
            ("true", True), ("False", False), ("~", None), ("", None), ("null", None), ("NULL", None), ("'1'", "1"),
            ('"yes"', "yes"), ("=", "="), ("1.2.3", "1.2.3"), ("[1, a, {b: c}]", [1, "a", {"b": "c"}]),
            ("1: x", {"1": "x"}), ("true: x", {"true": "x"}), ("<<: {a: 1}", {"<<": {"a": 1}}),
        ],
    )  # fmt: skip
    def test_what_is_meant(self, text, value):
        found = parse_yaml(text, where="recipe x")
        assert found == value
        assert type(found) is type(value)

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("a: 1\nb: 2\na: 3", "recipe x, line 3, column 1: the key 'a' appears twice (first on line 1)"),
            ("a: {b: 1,\n  b: 2}", "line 2, column 3"),
            ("a: 1\n'a': 2", "appears twice"),
            ("010", "octal"), ("a: -0123", "line 1, column 4"),
            (".inf", "finite"), ("-.INF", "finite"), (".nan", "finite"),
            ("1e999", "double"), ("1" * 5000, "5,000 characters"), ("0x" + "f" * 5000, "5,002 characters"),
            ("a: &x 1", "anchor &x"), ("a: *x", "alias *x"), ("!!python/object/apply:os.system [x]", "tag"),
            ("a: !!str 1", "tag"), ("! a", "tag"), ("a\n---\nb", "second document"),
            ("%YAML 1.1\n---\na", "directives"),
            ("[" * 200_000, "nest"), ("[" * 900, "nested more than 20"), ("{a: " * 30, "nested more than 20"),
            ("- " * 300 + "a", "nested"),
            ("? [a]\n: 1", "keys are plain text"), ("a: [1", "line 2"), ("a\0b", "is not YAML"), ("\ud800", "Unicode"),
            ("a: b: c", "line 1"), ("\tb: c", "line 1"), ("\x1b[31m", "is not YAML"),
        ],
    )  # fmt: skip
    def test_refused_with_line_and_cause(self, text, why):
        begun = time.process_time()
        with pytest.raises(UserError) as error:
            parse_yaml(text, where="recipe x")
        assert why in error.value.cause and error.value.cause.startswith("recipe x")
        assert error.value.cause.isprintable() and len(error.value.cause) < 300
        assert time.process_time() - begun < 1

    @settings(deadline=None)
    @given(VALUES)
    def test_what_is_written_is_read_back(self, value):
        assert parse_yaml(dump_yaml(value), where="x") == value

    @settings(deadline=None)
    @given(st.text(st.sampled_from("0123456789+-._eExobinfaNTyu:~ \"'"), max_size=8))
    def test_text_stays_text(self, text):
        assert parse_yaml(dump_yaml({"a": text}), where="x") == {"a": text}

    @settings(deadline=None)
    @given(st.text(max_size=100))
    def test_any_text_is_yaml_or_a_user_error(self, text):
        try:
            parse_yaml(text, where="x")
        except UserError:
            pass

    def test_where_both_read_a_value_it_is_the_same_or_text(self):
        """Beside PyYAML's 1.1: what it takes for a number or a truth is that here too, or the text as written."""
        rng = random.Random(0)
        for _ in range(3000):
            text = "".join(rng.choice("0123456789:._-+eExotruyalsfn~") for _ in range(rng.randint(1, 7)))
            try:
                ours = parse_yaml(text, where="x")
                theirs = yaml.safe_load(text)
            except (UserError, yaml.YAMLError, ValueError):
                continue
            if isinstance(ours, dict):
                continue
            assert ours in (theirs, text) or isinstance(ours, float) or text.lower().startswith("0o"), (text, ours)

    def test_large_files_are_not_read(self, tmp_path):
        (tmp_path / "r.yaml").write_text("#" * ((1 << 20) + 1))
        with pytest.raises(UserError, match="1,048,577 bytes"):
            read_yaml(tmp_path / "r.yaml", what="recipe")


def header_file(path, header: bytes, data: int) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(data))


A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B = {"dtype": "U8", "shape": [8], "data_offsets": [16, 24]}


class TestSafetensors:
    def test_honest_headers(self, tmp_path):
        path = tmp_path / "m.safetensors"
        header_file(path, json.dumps({"__metadata__": {"format": "pt"}, "b": B, "a": A}).encode() + b"   ", 24)
        header = read_safetensors_header(path)
        assert list(header.tensors) == ["b", "a"] and header.metadata == {"format": "pt"}
        assert header.tensors["a"].shape == (2, 2) and header.tensors["b"].bytes == 8
        assert header.tensors["a"].begin == header.data_begin

    @pytest.mark.parametrize(
        ("entries", "data", "why"),
        [
            ({"a": A, "b": {**B, "data_offsets": [8, 16]}}, 16, "overlaps 'a'"),
            ({"a": A, "b": {**B, "data_offsets": [20, 28]}}, 28, "does not begin where"),
            ({"a": {**A, "data_offsets": [4, 20]}}, 20, "does not begin where"),
            ({"a": A}, 24, "behind its last tensor"),
            ({"a": A}, 12, "cut short"),
            ({"a": {**A, "shape": [2.0, 2]}}, 16, "not whole numbers"),
            ({"a": {**A, "shape": [4.5]}}, 18, "not whole numbers"),
            ({"a": {**A, "shape": [True, 4]}}, 16, "not whole numbers"),
            ({"a": {**A, "shape": ["4"]}}, 16, "not whole numbers"),
            ({"a": {**A, "shape": [-2, -2]}}, 16, "not whole numbers"),
            ({"a": {**A, "shape": 4}}, 16, "not whole numbers"),
            ({"a": {**A, "data_offsets": [0.0, 16]}}, 16, "not whole numbers"),
            ({"a": {**A, "data_offsets": [0, 16, 32]}}, 16, "not whole numbers"),
            ({"a": {**A, "data_offsets": [16, 0]}}, 16, "has -16 bytes"),
            ({"a": {**A, "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}}, 0, "larger than any file"),
            ({"a": {**A, "shape": [1] * 99 + [4]}}, 16, "larger than any file"),
            ({"a": {**A, "dtype": "F33"}}, 16, "stored as 'F33'"),
            ({"a": {**A, "dtype": 3}}, 16, "stored as 3"),
            ({"a": {**A, "more": 1}}, 16, "damaged"),
            ({"a": []}, 0, "damaged"),
            ({"__metadata__": {"a": 1}}, 0, "table of texts"),
            ({"a": {**A, "dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, 1, "has 1 bytes"),
        ],
    )
    def test_refused(self, tmp_path, entries, data, why):
        header_file(tmp_path / "m.safetensors", json.dumps(entries).encode(), data)
        with pytest.raises(UserError) as error:
            read_safetensors_header(tmp_path / "m.safetensors")
        assert why in error.value.cause and len(error.value.cause) < 500 + len(str(tmp_path))

    @pytest.mark.parametrize(
        "header",
        [
            b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 16]}}',
            b'{"a": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]}, "a": {"dtype": "U8", "shape": [16],'
            b' "data_offsets": [0, 16]}}',
            b' {"a": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]}}',
            b"[" * 50_000,
            b'{"a": ' * 50_000,
            b"\xff\xfe",
            b"",
        ],
    )
    def test_headers_that_are_no_such_json(self, tmp_path, header):
        header_file(tmp_path / "m.safetensors", header, 16)
        with pytest.raises(UserError):
            read_safetensors_header(tmp_path / "m.safetensors")

    def test_lengths_that_lie(self, tmp_path):
        path = tmp_path / "m.safetensors"
        for raw in (b"", b"\1", struct.pack("<Q", 1 << 60), struct.pack("<Q", 100) + b"{}", b"\xff" * 16):
            path.write_bytes(raw)
            with pytest.raises(UserError):
                read_safetensors_header(path)

    def test_what_passes_here_passes_in_the_formats_own_library(self, tmp_path):
        """Headers changed at random: it opens all that this reader lets through."""
        from safetensors import safe_open

        rng = random.Random(0)
        path = tmp_path / "m.safetensors"
        passed = 0
        for _ in range(1500):
            header_file(path, _changed_header(rng), rng.choice([24, 24, 24, 16, 0, 32]))
            try:
                ours = read_safetensors_header(path)
            except UserError:
                continue
            passed += 1
            with safe_open(path, framework="numpy") as file:
                assert set(file.keys()) == set(ours.tensors)
                for name, entry in ours.tensors.items():
                    assert tuple(file.get_slice(name).get_shape()) == entry.shape
        assert passed > 100

    def test_every_dtype_is_one_of_the_librarys(self, tmp_path):
        from safetensors import safe_open

        path = tmp_path / "m.safetensors"
        for dtype, bits in BITS.items():
            entry = {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}
            header_file(path, json.dumps({"a": entry}).encode(), bits)
            assert read_safetensors_header(path).tensors["a"].dtype == dtype
            with safe_open(path, framework="numpy") as file:
                assert file.get_slice("a").get_dtype() == dtype


def _changed_header(rng: random.Random) -> bytes:
    entries: dict[str, dict] = {"a": {**A}, "b": {**B}}
    for _ in range(rng.randint(0, 2)):
        entry = rng.choice(list(entries.values()))
        odd = rng.choice([-1, 0, 1, 2, 3, 4, 8, 16, 24, 2**31, 2**63, 2**64, 1.0, 1.5, True, None, "4", 10**40])
        what = rng.choice(["dtype", "shape", "offset", "shape", "swap", "more"])
        if what == "dtype":
            entry["dtype"] = rng.choice([*BITS, "F31", "", 7])
        elif what == "shape":
            entry["shape"] = rng.choice([[odd], [odd, 4], [1, 2, 2], [16], [], [0], [2, 1, 2, 1], odd])
        elif what == "offset":
            entry["data_offsets"] = rng.choice([[odd, 16], [0, odd], [16, 24], [0, 16], [8, 24], [0, 8], [odd]])
        elif what == "swap":
            entries = dict(reversed(entries.items()))
        else:
            entry["more"] = odd
    text = json.dumps(entries)
    if rng.random() < 0.2:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice('"{}[],:0 eE.-') + text[at + rng.randint(0, 1) :]
    return text.encode()


def test_values_are_shown_short_and_plain():
    assert shown("a") == "'a'" and shown([1]) == "[1]"
    assert len(shown("x" * 10**7)) == 120 and len(shown(["x" * 1000])) == 120
    assert shown("\x1b[31m\u202e") == r"'\x1b[31m\u202e'"
    assert "too long" in shown(10**5000)


class TestPatterns:
    """A search ends: whoever writes a pattern, in a profile or within somebody's bundle, cannot make one that hangs."""

    @pytest.mark.parametrize(
        "pattern",
        ["(a+)+$", "a?" * 60 + "a" * 60, "a*a*a*a*a*a*b", "(a?){30}b", "(?:a|b)+", "(ab?)+", "(?=a*a*a*a*b)",
         "a{1,50}a{1,50}a{1,50}a{1,50}b", "(a|a)" * 40 + "b", "((a|a)(a|a)){9}", "a" * 501],
    )  # fmt: skip
    def test_what_may_take_for_ever_is_refused(self, pattern):
        with pytest.raises(ValueError, match=r"repeats|leave out|characters"):
            compiled_pattern(pattern)

    @pytest.mark.parametrize(
        "pattern",
        [r"Raspberry Pi 5\b", "SM8650|Snapdragon 8 Gen 3|pineapple", "(?i)orin.*nano", r"blk\.(0|1|2)\.(attn|ffn)_.+",
         r"layers\.\d+?\.mlp", "(?:big)?board", r"\+?x", "[*+?({]+", "a++b"],
    )  # fmt: skip
    def test_what_people_write_is_taken(self, pattern):
        assert compiled_pattern(pattern).search("zzz") is None

    def test_a_search_takes_seconds_at_most(self):
        rng = random.Random(0)
        parts = ["a", "b", "a*", "a+", "a?", "(a", "(?:a", ")", ")*", ")?", "|", "[ab]*", "a{1,9}", r"\w+", ".*"]
        taken = 0
        while taken < 200:
            text = "".join(rng.choices(parts, k=rng.randint(2, 12))) + "c"
            try:
                pattern = compiled_pattern(text)
            except ValueError:
                continue
            taken += 1
            started = time.process_time()
            pattern.search("a" * 100 + "\n" + "a" * 100)
            assert time.process_time() - started < 10, text
