"""What tells a replica from all others is alike at its ranks, and tells nothing of the token that it is made of."""

from workers.startup.transfers import incarnation


def test_an_incarnation_is_alike_at_every_rank_and_unlike_in_every_replica() -> None:
    tokens = [bytes([number]) * 32 for number in range(100)]
    incarnations = [incarnation(token) for token in tokens]
    assert incarnations == [incarnation(token) for token in tokens]
    assert len(set(incarnations)) == len(tokens) and {len(each) for each in incarnations} == {16}


def test_an_incarnation_has_no_part_of_its_token() -> None:
    token = bytes(range(32))
    own = incarnation(token)
    assert not any(own[at : at + 4] in token for at in range(13))
