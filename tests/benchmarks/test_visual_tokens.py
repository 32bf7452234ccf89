from benchmarks.visual_tokens import retrieval_cost


def test_retrieval():
    cost = retrieval_cost(40, 8)
    assert cost["seconds"] > 0 and cost["index_bytes"] == 40 * 8 * 4
