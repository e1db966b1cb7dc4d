"""vDNN's own rules, on examples from the paper's text."""

from __future__ import annotations

import pytest

from vdnn.analysis.moments import resolve
from vdnn.analysis.synthetic import conv_chain, fork_join, transformer_chain
from vdnn.policies import Options, decide
from vdnn.policies.paper_rules import PaperLayer, find_prefetch_layer
from vdnn.values import Keep, Offload, Plan, hardware

PAPER = Options(rules="paper", min_bytes=0)
GPU = hardware("titan-x")


def actions(plan: Plan) -> dict[str, Keep | Offload]:
    return {str(name): entry.action for entry in plan.entries for name in entry.saved}


def layers(text: str) -> list[PaperLayer]:
    """`C` a CONV layer, `-` another; a star marks one whose X was offloaded."""
    return [PaperLayer(word[0] == "C", word.endswith("*")) for word in text.split()]


def chosen(net: list[PaperLayer]) -> list[int]:
    """What each layer's backward fetches, last layer first."""
    return [find_prefetch_layer(current, net) for current in range(len(net) - 1, -1, -1)]


def test_with_all_offloaded_each_layer_fetches_the_one_before_it():
    """conv pool conv pool fc: fc fetches the pool's X, that pool the conv's, and so on; the first fetches nothing."""
    assert chosen(layers("C* -* C* -* -")) == [3, 2, 1, 0, -1]


def test_with_only_conv_offloaded_the_search_passes_other_layers():
    """At 5 the search passes 4 and finds 3. At 4 it meets 3, fetched and CONV: nothing. At 3 it passes 2 and 1."""
    assert chosen(layers("C* - - C* - -")) == [3, -1, 0, -1, -1, -1]


def test_the_search_ends_at_the_next_conv_layer():
    """At layer 5 the CONV 3 is offloaded: fetch. At 4 it is fetched already and is CONV: nothing.

    At 3 the search meets CONV 1, which was not offloaded, and ends there, though 0 is still on the host.
    Only at 1 can 0 be fetched.
    """
    assert chosen(layers("-* C - C* - -")) == [3, -1, -1, -1, 0, -1]


def test_a_layer_is_fetched_once():
    net = layers("C* - -")
    assert find_prefetch_layer(2, net) == 0
    assert find_prefetch_layer(2, net) == -1


def test_in_a_fork_the_last_consumer_releases():
    """stem.relu's output feeds `left` and `right`: Refcnt 2, so only the end of `right` may release it."""
    plan = decide("vdnn-all", fork_join(), GPU, PAPER)
    action = actions(plan)["left#0/0"]
    assert isinstance(action, Offload)
    assert action == actions(plan)["right#0/0"]
    assert action.release_at == "end right#0"
    # mirrored in backward: `right` comes first there and needs it, so the layer before fetches it
    assert action.prefetch_at == "unpack head#0/0"


def test_every_layer_is_joined_at_its_end_in_backward():
    """Under `conv`, conv1's X comes back beside conv2; pool1 is the next to run backward, and waits for it."""
    plan = actions(decide("vdnn-conv", conv_chain(), GPU, PAPER))
    assert plan["conv1#0/0"] == Offload("end conv1#0", "unpack conv2#0/0", "unpack pool1#0/0")


def test_a_pool_whose_own_x_came_back_does_not_hold_the_next_one_beside_it():
    """Under `all` the X of conv1 comes beside relu1, after pool1: the paper's peaks have no room for both."""
    plan = actions(decide("vdnn-all", conv_chain(), GPU, PAPER))
    assert plan["pool1#0/0"].prefetch_at == "unpack conv2#0/0", "pool1's X is needed by relu1 too"
    assert plan["conv1#0/0"] == Offload("end conv1#0", "unpack relu1#0/0")


def test_only_inputs_of_conv_and_pool_layers_leave_and_never_those_of_fc():
    trace = conv_chain()
    everything = actions(decide("vdnn-all", trace, GPU, PAPER))
    assert isinstance(everything["conv0#0/0"], Offload), "the batch is offloaded too"
    assert isinstance(everything["pool1#0/0"], Offload)
    assert isinstance(everything["pool1#0/1"], Keep), "indices are no X"
    assert isinstance(everything["fc#0/0"], Keep)
    only_conv = actions(decide("vdnn-conv", trace, GPU, PAPER))
    assert isinstance(only_conv["conv1#0/0"], Offload)
    assert only_conv["pool1#0/0"] == Keep("not the input of a conv layer")


def test_nothing_is_fetched_twice_or_before_it_left():
    for trace in (conv_chain(), fork_join()):
        for move in resolve(decide("vdnn-all", trace, GPU, PAPER), trace):
            assert move.out < move.release < move.fetch <= move.need


def test_without_conv_and_pool_layers_the_paper_offloads_nothing_and_says_so():
    plan = decide("vdnn-all", transformer_chain(), GPU, PAPER)
    assert plan.offloaded_bytes == 0
    assert "no CONV or POOL layers" in plan.notes[0]


@pytest.mark.parametrize("rules", ["event", "paper"])
def test_without_conv_layers_vdnn_conv_says_what_it_does_instead(rules):
    plan = decide("vdnn-conv", transformer_chain(), GPU, Options(rules=rules, min_bytes=0, keep_soon=False))
    assert "no CONV layers" in plan.notes[0]
    assert "matrix products and attention" in plan.notes[0]
    decided = actions(plan)
    assert isinstance(decided["h.1.out#0/0"], Offload)
    assert isinstance(decided["h.1.attention#0/0"], Offload)
    # a norm's input that no product saves stays; with conv layers there would be no note
    assert decided["h.1.norm1#0/0"] == Keep("not saved by a matrix product or attention") or rules == "paper"
    assert not any("no CONV" in note for note in decide("vdnn-conv", conv_chain(), GPU).notes)
