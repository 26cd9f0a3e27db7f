// What a dispatch leaves beside the rows: the counts of each expert, and in a call that fails nothing that passes for a
// result. Rows and scales are NaN then, and no expert has rows.
#pragma once

#include "device/algo/group.h"
#include "kernels/low_latency/routing_table.h"

namespace deep_ep::kernels::low_latency::dispatch {
inline namespace EP_BACKEND {

using Params = LowLatencyDispatchParams;

EP_DEVICE int row_bytes(const Params& p) { return p.payload == Payload::kFp8 ? p.call.hidden : p.call.hidden * 2; }
EP_DEVICE int num_vecs(const Params& p) { return row_bytes(p) / static_cast<int>(sizeof(Vec16)); }

// Lists of counts, each written by one warp: 32 experts, or with very many experts several times 32.
EP_DEVICE int num_lists(const CallContext& c) {
    const int wanted = (c.num_local_experts() + kWarpSize - 1) / kWarpSize;
    return wanted < layout::LowLatencyLaunchState::kMaxLists ? wanted : layout::LowLatencyLaunchState::kMaxLists;
}

// This lane: how many rows the expert gets, and from whom.
EP_DEVICE void write_count(const Params& p, const CallContext& c, const Counts& counts, int expert) {
#pragma unroll 1
    for (int source = 0; source < c.num_ranks(); ++source) {
        const int64_t first = counts.before(source)[expert];
        p.layout_range[static_cast<int64_t>(expert) * c.num_ranks() + source] =
            first << 32 | (counts.before(source + 1)[expert] - first);
    }
    const int num_rows = counts.before(c.num_ranks())[expert];
    p.recv_count[expert] = num_rows;
    if (p.cumulative_stats != nullptr) p.cumulative_stats[expert] += num_rows;
}

template <class Work> EP_DEVICE void for_experts_of_list(Warp warp, const CallContext& c, int list, const Work& work) {
    warp.expect();
#pragma unroll 1
    for (int expert = list * kWarpSize + warp.thread_rank(); expert < c.num_local_experts();
         expert += num_lists(c) * kWarpSize)
        work(expert);
}

// The experts of the list have no rows.
EP_DEVICE void void_list(Warp warp, const Params& p, const CallContext& c, int list) {
    for_experts_of_list(warp, c, list, [&](int expert) {
        p.recv_count[expert] = 0;
        for (int source = 0; source < c.num_ranks(); ++source)
            p.layout_range[static_cast<int64_t>(expert) * c.num_ranks() + source] = 0;
    });
}

// The call may fail meanwhile: whoever comes last of this one and void_lists makes the list void.
EP_DEVICE void write_list(Warp warp, const Params& p, const CallContext& c, const BlockRole& role, const Counts& counts,
                          int list) {
    for_experts_of_list(warp, c, list, [&](int expert) { write_count(p, c, counts, expert); });
    warp.sync();  // every lane's counts, lane 0's release
    uint32_t lists = 0;
    // Pairs with: void_lists, whichever is first.
    if (warp.thread_rank() == 0)
        lists = prim::fetch_or<Order::kRelease, Scope::kGpu>(&role.launch_state->lists, 1u << list);
    if ((__shfl_sync(kFullMask, lists, 0) & layout::LowLatencyLaunchState::kVoidLists) != 0)
        void_list(warp, p, c, list);
}

// In a call that has failed.
EP_DEVICE void void_lists(Warp warp, const Params& p, const CallContext& c,
                          layout::LowLatencyLaunchState* launch_state) {
    warp.expect();
    constexpr uint32_t kVoidLists = layout::LowLatencyLaunchState::kVoidLists;
    uint32_t lists = 0;
    if (warp.thread_rank() == 0) lists = prim::fetch_or<Order::kAcquire, Scope::kGpu>(&launch_state->lists, kVoidLists);
    lists = __shfl_sync(kFullMask, lists, 0);
    warp.sync();  // lane 0's acquire, every lane's stores
    if ((lists & kVoidLists) != 0) return;
    for (; lists != 0; lists &= lists - 1) void_list(warp, p, c, __ffs(static_cast<int>(lists)) - 1);
}

// Memory that one launch fills, a piece at a time.
struct VoidMemory {
    void* bytes;
    int64_t num_bytes;

    static constexpr int64_t kBytesAtOnce = 64 * 1024;
    EP_DEVICE int64_t num_pieces() const { return (num_bytes + kBytesAtOnce - 1) / kBytesAtOnce; }
    EP_DEVICE void fill(Warp warp, int64_t piece) const {
        const int64_t first = piece * kBytesAtOnce, rest = num_bytes - first;
        algo::void_output(warp, static_cast<uint8_t*>(bytes) + first, rest < kBytesAtOnce ? rest : kBytesAtOnce);
    }
};

// A warp of a launch in which no row has a place, as a table has not come: with the other warps like it, it fills both.
EP_DEVICE void void_rows(Warp warp, layout::LowLatencyLaunchState* launch_state, VoidMemory rows, VoidMemory scales) {
    const int64_t num_pieces = rows.num_pieces() + scales.num_pieces();
    for (;;) {
        uint32_t next = 0;
        if (warp.thread_rank() == 0)
            next = prim::fetch_add<Order::kRelaxed, Scope::kGpu>(&launch_state->void_pieces, 1u);
        const int64_t piece = __shfl_sync(kFullMask, next, 0);
        if (piece >= num_pieces) return;
        if (piece < rows.num_pieces())
            rows.fill(warp, piece);
        else
            scales.fill(warp, piece - rows.num_pieces());
    }
}

// A warp that has met what makes the call fail. `knows_rows`: from tables that are right, so that each row is void by the warp
// that waits for it. If not, all are. (Other blocks may just have seen all tables: a row is right or NaN.)
EP_DEVICE_COLD void void_outputs(Warp warp, const Params* p, CallContext c, layout::LowLatencyLaunchState* launch_state,
                                 bool knows_rows) {
    const int64_t num_rows = static_cast<int64_t>(c.num_local_experts()) * c.num_rows_of_expert();
    void_lists(warp, *p, c, launch_state);
    if (knows_rows) return;
    void_rows(warp, launch_state, {p->recv_x, num_rows * row_bytes(*p)},
              {p->recv_scales, num_rows * p->num_scale_words * 4});
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::dispatch
