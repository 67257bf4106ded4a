"""Keys go to the partitions that the Java client gives them."""

from __future__ import annotations

import pytest
from aiokafka.partitioner import murmur2 as reference
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.kafka.partitions import murmur2, partition_of


@pytest.mark.parametrize(
    ("key", "signed"),
    [  # the vectors of Kafka's own UtilsTest
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_the_hash_of_a_key_is_that_of_the_java_client(key: bytes, signed: int) -> None:
    assert murmur2(key) == signed % (1 << 32)


@given(st.binary(max_size=300))
def test_the_hash_of_any_key_is_that_of_the_byte_by_byte_algorithm(key: bytes) -> None:
    assert murmur2(key) == reference(key)


@given(st.binary(max_size=50), st.integers(1, 1000))
def test_the_partition_of_a_key_is_its_hash_without_the_sign(key: bytes, partitions: int) -> None:
    assert partition_of(key, partitions) == (reference(key) & 0x7FFFFFFF) % partitions
