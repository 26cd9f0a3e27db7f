// From launch parameters to what device code works with.
#pragma once

#include "device/algo/watch.h"
#include "kernels/params.h"

namespace deep_ep::kernels {
inline namespace EP_BACKEND {

EP_DEVICE algo::Heap make_heap(const HeapParams& heap) {
    return algo::Heap(heap.bases, heap.rank, heap.num_ranks, heap.control, heap.first_rank, heap.num_nodes);
}

EP_DEVICE algo::WatchWords make_watch_words(const WatchParams& watch) {
    return {watch.local, watch.status, watch.timeout_ns, watch.late_ns};
}

EP_DEVICE algo::Watch make_watch(const WatchParams& watch, const HeapParams& heap, layout::Operation operation,
                                 uint64_t call) {
    return {make_watch_words(watch), make_heap(heap), operation, call};
}

// Routing tables come with 32- or 64-bit ids.
EP_DEVICE int64_t load_expert_id(const void* ids, int idx_bytes, int64_t index) {
    return idx_bytes == 8 ? static_cast<const int64_t*>(ids)[index]
                          : static_cast<int64_t>(static_cast<const int32_t*>(ids)[index]);
}

EP_DEVICE void store_expert_id(void* ids, int idx_bytes, int64_t index, int value) {
    if (idx_bytes == 8)
        static_cast<int64_t*>(ids)[index] = value;
    else
        static_cast<int32_t*>(ids)[index] = value;
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels
