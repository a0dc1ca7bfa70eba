"""How far a round goes ahead, from given times."""

from rgtg_fast.decode.pace import RETRY, Costs, Retry, Seconds


def costs(draft, reward, guess=0.0):
    """Of forwards of m tokens, m = 1 .. 8, that take draft[0] + draft[1] * m; and so on."""
    found = Costs()
    for m in range(1, 9):
        for _ in range(3):
            found.draft.add(m, draft[0] + draft[1] * m)
            found.reward.add(m, reward[0] + reward[1] * m)
    found.guess.add(1, guess)
    return found


def test_the_first_time_of_a_length_does_not_count_once_there_are_more():
    seconds = Seconds()
    seconds.add(2, 9.0)
    assert seconds(2) == 9.0
    seconds.add(2, 1.0)
    assert seconds(2) == 1.0


def test_times_between_and_beyond_lengths_are_on_the_line_through_their_neighbours():
    seconds = Seconds()
    seconds.add(1, 1.0)
    assert seconds(5) == 1.0
    seconds.add(3, 2.0)
    assert seconds(2) == 1.5 and seconds(5) == 3.0
    seconds.add(5, 8.0)
    assert seconds(4) == 5.0 and seconds(7) == 14.0


def test_guesses_are_made_while_a_longer_forward_gains_more_than_it_costs():
    found = costs((1.0, 0.1), (1.0, 0.0))
    assert found.best(7, right=0.0)[0] == 0
    assert found.best(7, right=1.0)[0] == 7
    count, each = found.best(7, right=0.5)
    want = {g: (1.1 + 0.1 * g) / sum(0.5**i for i in range(g + 1)) for g in range(8)}
    assert count == min(want, key=want.get) and abs(each - want[count]) < 1e-12
    assert costs((1.0, 0.1), (1.0, 0.0), guess=2.0).best(7, right=0.9)[0] == 0


def test_a_position_more_is_drafted_where_a_token_gets_cheaper_by_it():
    found = costs((0.0, 0.1), (1.0, 0.2))
    one_more = {"drafted": 1, "nodes": 4, "then": 8, "yields": 1.0}
    assert found.one_more_pays(**one_more, more=0.9, each=0.1)
    assert not found.one_more_pays(**one_more, more=0.1, each=0.1)
    assert not found.one_more_pays(**one_more, more=0.7, each=5.0)
    assert not Costs().one_more_pays(**one_more, more=0.9, each=None)


def test_what_does_not_pay_is_tried_again_now_and_then():
    again = Retry()
    assert [again(False) for _ in range(2 * RETRY + 2)].count(True) == 2
    assert again(True)
