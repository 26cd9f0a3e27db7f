// Where rows stand.
#pragma once

#include "device/prim.h"
#include "layout/heap.h"

namespace deep_ep::kernels {
inline namespace EP_BACKEND {

// Rows of one rank at another, and all rows there.
struct RowSpan {
    int first, end, total;

    EP_DEVICE bool can_be() const { return first >= 0 && end >= first && end <= total; }
};

// rank_prefix_matrix[src][dst]: rows that the sources 0..src send to dst. Sources are ranks of all nodes, destinations those
// of this node.
struct RowMap {
    const int* prefix;
    int num_ranks;  // destinations
    int num_sources = num_ranks;

    EP_DEVICE int first_row(int source, int destination) const {
        return source == 0 ? 0 : prefix[(source - 1) * num_ranks + destination];
    }
    EP_DEVICE int num_rows(int source, int destination) const {
        return prefix[source * num_ranks + destination] - first_row(source, destination);
    }
    EP_DEVICE int total_rows(int destination) const { return prefix[(num_sources - 1) * num_ranks + destination]; }
    EP_DEVICE RowSpan span(int source, int destination) const {
        return {first_row(source, destination), prefix[source * num_ranks + destination], total_rows(destination)};
    }
};

// What one rank needs of that matrix, in shared memory: it is known before the matrix is.
class RowTable {
public:
    EP_DEVICE int first_row_at(int destination) const { return first_at_[destination]; }
    EP_DEVICE int num_rows_at(int destination) const { return num_at_[destination]; }
    EP_DEVICE int first_row_from(int source) const { return source == 0 ? 0 : end_from_[source - 1]; }
    EP_DEVICE int num_rows_from(int source) const { return end_from_[source] - first_row_from(source); }

    EP_DEVICE int num_rows(int num_ranks) const { return end_from_[num_ranks - 1]; }

    // Takes in prefix[source][destination]. Every source of a destination, in order, by one thread.
    EP_DEVICE void take(int self, int source, int destination, int sum) {
        if (source == 0 && self == 0) first_at_[destination] = 0;
        if (source + 1 == self) first_at_[destination] = sum;
        if (source == self) num_at_[destination] = sum - first_at_[destination];
        if (destination == self) end_from_[source] = sum;
    }

private:
    int first_at_[layout::kMaxRanks];  // of this rank's rows at each destination
    int num_at_[layout::kMaxRanks];    // of them
    int end_from_[layout::kMaxRanks];  // of each source's rows here: one beyond the last
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels
