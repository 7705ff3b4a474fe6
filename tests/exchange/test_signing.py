from lightning_byzantine.exchange.signing import PUBLIC_KEY_BYTES, SigningKey, _prime, is_signed

PRIME = _prime()
# RFC 7919, appendix A.1: how the prime of ffdhe2048 begins and ends.
BEGINS, ENDS = "ffffffffffffffffadf85458a2bb4a9aafdc5620273d3cf1", "886b423861285c97ffffffffffffffff"


def test_only_the_owner_signs_and_only_what_was_signed() -> None:
    key, other = SigningKey(), SigningKey()
    signature = key.sign(b"message")
    assert is_signed(b"message", signature, key.public)
    assert not is_signed(b"massage", signature, key.public)
    assert not is_signed(b"message", signature, other.public)
    assert key.sign(b"message") != signature
    for place in (0, 31, 32, len(signature) - 1):
        forged = bytearray(signature)
        forged[place] ^= 1
        assert not is_signed(b"message", bytes(forged), key.public)


def test_nonsense_is_no_signature() -> None:
    key = SigningKey()
    signature = key.sign(b"message")
    assert not is_signed(b"message", signature[:-1], key.public)
    assert not is_signed(b"message", b"", key.public)
    for public in (0, 1, PRIME - 1, PRIME):
        assert not is_signed(b"message", signature, public.to_bytes(PUBLIC_KEY_BYTES))


def test_the_group_is_that_of_the_standard() -> None:
    digits = f"{PRIME:x}"
    assert digits.startswith(BEGINS) and digits.endswith(ENDS) and len(digits) == 512
    # Both are prime, by Fermat's test, and 4 is of the subgroup's order.
    order = (PRIME - 1) // 2
    assert pow(2, PRIME - 1, PRIME) == pow(3, order - 1, order) == pow(4, order, PRIME) == 1
