// Which ranks share a node and which share a rail, as kernels and layouts use it; Python finds it (deep_ep/_peers.py).
// Nodes of equal size whose ranks follow each other: rank = node * ranks_per_node + index. A *neighbour* is a rank of the
// same node, a *rail peer* the rank with the same index in another node; the *forwarder* of a rank in a node is the one on
// its rail.
#pragma once

namespace deep_ep::layout {

struct Topology {
    int num_ranks = 1;
    int ranks_per_node = 1;
    int rank = 0;

    constexpr int num_nodes() const { return num_ranks / ranks_per_node; }
    constexpr int node() const { return node_of(rank); }
    constexpr int index() const { return index_of(rank); }

    constexpr int node_of(int other) const { return other / ranks_per_node; }
    constexpr int index_of(int other) const { return other % ranks_per_node; }
    constexpr bool is_neighbour(int other) const { return node_of(other) == node(); }
    constexpr int neighbour(int index) const { return node() * ranks_per_node + index; }
    constexpr int rail_peer(int node) const { return node * ranks_per_node + index(); }
    constexpr int forwarder(int source, int node) const { return node * ranks_per_node + index_of(source); }
};

}  // namespace deep_ep::layout
