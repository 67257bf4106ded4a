"""JSON texts that are kept as they were sent: forbidden escapes and depth, as plain loops over the text find them."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.events.json_text import deeper_than, has_forbidden_escape, pruned, with_nul_for_surrogates

WORDS = rb"\u0000 \ud83d \uDBFF \uDe00 \udfff \u00e9 \\ \" \/ \n u0000 ud83d [ ] { } a 0".split()
strings = st.lists(st.sampled_from(WORDS), max_size=8).map(lambda words: b'"' + b"".join(words) + b'"')
texts = st.recursive(
    strings | st.just(b"1"),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: b"[" + b", ".join(items) + b"]")
        | st.lists(st.tuples(strings, inner), max_size=3).map(
            lambda items: b"{" + b",".join(name + b":" + value for name, value in items) + b"}"
        )
    ),
    max_leaves=8,
)
BYTES = 1 << 20
# Each is what some pattern could try again and again from every byte of it.
HOSTILE = {
    "backslashes": b'"' + rb"\\" * (BYTES // 2) + b'"',
    "an odd number of backslashes": b'"' + b"\\" * (BYTES + 1),
    "escapes that are cut short": rb"\u" * (BYTES // 2),
    "pairs": b'"' + rb"\ud83d\ude00" * (BYTES // 12) + b'"',
    "first halves": b'"' + rb"\ud83d" * (BYTES // 6) + b'"',
    "second halves": b'"' + rb"\ude00" * (BYTES // 6) + b'"',
    "what only looks like one": b'"' + rb"\\ud83d" * (BYTES // 7) + rb"\u0000" + b'"',
    "quotes": b'"' * BYTES,
    "escaped quotes": b'"' + rb"\"" * (BYTES // 2),
    "strings that are open": b'"[' * (BYTES // 2),
    "openings": b"[{" * (BYTES // 2),
}


def walked(text: bytes) -> tuple[bytes, bool, int]:
    """The text with NUL for lone surrogates, whether it holds a forbidden escape, and how deep it is."""
    mended = bytearray(text)
    position = level = deepest = 0
    forbidden = in_string = False
    while position < len(text):
        step = 1
        match text[position : position + 1]:
            case b"\\" if text[position + 1 : position + 2] == b"u":
                step = 6
                code = int(text[position + 2 : position + 6], 16)
                after = text[position + 6 : position + 12]
                if 0xD800 <= code < 0xDC00 and after[:2] == rb"\u" and 0xDC00 <= int(after[2:], 16) < 0xE000:
                    step = 12
                elif code == 0 or 0xD800 <= code < 0xE000:
                    mended[position : position + 6] = rb"\u0000"
                    forbidden = True
            case b"\\":
                step = 2
            case b'"':
                in_string = not in_string
            case b"[" | b"{" if not in_string:
                level += 1
                deepest = max(deepest, level)
            case b"]" | b"}" if not in_string:
                level -= 1
        position += step
    return bytes(mended), forbidden, deepest


@given(text=texts, depth=st.integers(0, 3))
@example(text=rb'{"a":"x\ud83d","b":1}', depth=0)
@example(text=rb'{"a":"x\ud83d\u0041","b":1}', depth=0)
@example(text=rb'{"a":"\\\ud83d\ude00\ude00\\"}', depth=1)
@example(text=rb'"\\ud83d\ude00"', depth=1)
@example(text=rb'["\\","[","\"["]', depth=1)
def test_every_text_is_judged_as_a_walk_through_it_judges(text: bytes, depth: int) -> None:
    mended, forbidden, deepest = walked(text)
    assert has_forbidden_escape(text) == forbidden
    assert with_nul_for_surrogates(text) == mended
    padded = text + b" " * 2 * depth  # what is shorter is not looked at: it cannot be deeper
    assert deeper_than(padded, depth) == (deepest > depth)


@given(text=texts, depth=st.integers(1, 3))
@example(text=rb'["\\",[["\"[",1]],"]"]', depth=2)
def test_a_pruned_text_is_as_deep_as_allowed_and_otherwise_the_same(text: bytes, depth: int) -> None:
    _, _, deepest = walked(text)
    cut = pruned(text, depth)
    assert cut is not None
    assert walked(cut)[2] == min(deepest, depth)
    assert deepest > depth or cut == text


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_text_made_to_be_slow_takes_time_by_its_length(text: bytes) -> None:
    began_s = time.process_time()
    for judge in (has_forbidden_escape, with_nul_for_surrogates, deeper_than, pruned):
        judge(text)
    assert time.process_time() - began_s < 2  # 0.3 s; with one look back from each byte it would be minutes
