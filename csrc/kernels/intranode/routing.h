// Where rows stand, read off the prefix matrix that the count exchange has made.
#pragma once

#include "device/prim.h"

namespace deep_ep::kernels {
inline namespace EP_BACKEND {

// rank_prefix_matrix[src][dst]: rows that the sources 0..src send to dst.
struct RowMap {
    const int* prefix;
    int num_ranks;

    EP_DEVICE int first_row(int source, int destination) const {
        return source == 0 ? 0 : prefix[(source - 1) * num_ranks + destination];
    }
    EP_DEVICE int num_rows(int source, int destination) const {
        return prefix[source * num_ranks + destination] - first_row(source, destination);
    }
    EP_DEVICE int total_rows(int destination) const { return prefix[(num_ranks - 1) * num_ranks + destination]; }
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels
