// Our own top-k ids and weights, which every rank needs that sums rows of our tokens.
#pragma once

#include "kernels/low_latency/launch_session.h"

namespace deep_ep::kernels::low_latency::combine {
inline namespace EP_BACKEND {

template <bool kUsesPackets> struct WeightSender {
    using Params = LowLatencyCombineParams;
    using Phase = SendPhase<Tells::kInside>;
    static constexpr int kAhead = 4;  // entries of a thread

    // A thread's part of our own table, from entry `base` on.
    struct Held {
        int expert[kAhead];
        float weight[kAhead];
    };

    static EP_DEVICE Held load(Block block, const Params& p, const CallContext& c, int base) {
        Held held = {};
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int entry = base + i * block.size() + block.thread_rank();
            held.expert[i] = -1;
            if (entry >= p.num_tokens * c.call.num_topk) continue;
            // An id out of range reaches no rank; the table must agree.
            held.expert[i] = checked_expert(c, algo::load_expert_id(p.topk_idx, p.idx_bytes, entry));
            held.weight[i] = p.topk_weights[entry];
        }
        return held;
    }

    static EP_DEVICE void send_packets(Block block, const CallContext& c, int peer, const Held& held, int base,
                                       int num_entries) {
        prim::Packet* packets = c.packets(peer, c.rank());
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int entry = base + i * block.size() + block.thread_rank();
            if (entry >= num_entries) continue;
            send_packet(c, packets + 2 * entry, held.expert[i]);
            send_packet(c, packets + 2 * entry + 1, __float_as_int(held.weight[i]));
        }
    }

    // In packets those of tokens that do not exist as well, so that nobody has to know how many do.
    static EP_DEVICE void send_all_packets(Block block, const Params& p, const CallContext& c, const Phase& phase,
                                           Held held, bool is_loaded) {
        const int num_entries = c.call.num_max_tokens * c.call.num_topk;
#pragma unroll 1
        for (int base = 0; base < num_entries; base += kAhead * block.size()) {
            if (base > 0 || !is_loaded) held = load(block, p, c, base);
            for (int i = 0; i < c.num_near(); ++i)
                if (const int peer = c.near_rank(i); !phase.leaves_out(peer))
                    send_packets(block, c, peer, held, base, num_entries);
            if constexpr (kAcrossNodes)
                store_table(block, c, c.far().template at<uint8_t>(c.staged_table()), held, base,
                            p.num_tokens * c.call.num_topk);
        }
        if constexpr (kAcrossNodes) phase.publish_far_table(block, p.num_tokens);
    }

    static EP_DEVICE void store_table(Block block, const CallContext& c, uint8_t* message, const Held& held, int base,
                                      int num_entries) {
        auto* ids = reinterpret_cast<int*>(message + c.call.message.topk_idx.offset);
        auto* weights = reinterpret_cast<float*>(message + c.call.message.topk_weights.offset);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int entry = base + i * block.size() + block.thread_rank();
            if (entry < num_entries) ids[entry] = held.expert[i];
            if (entry < num_entries) weights[entry] = held.weight[i];
        }
    }

    static EP_DEVICE void send_tables(Block block, const Params& p, const CallContext& c, const Phase& phase, Held held,
                                      bool is_loaded) {
        block.expect();
        const int num_entries = p.num_tokens * c.call.num_topk;
#pragma unroll 1
        for (int base = 0; base < num_entries; base += kAhead * block.size()) {
            if (base > 0 || !is_loaded) held = load(block, p, c, base);
            phase.for_tables([&](uint8_t* message) { store_table(block, c, message, held, base, num_entries); });
        }
        phase.publish_table(block, p.num_tokens);
    }

    // The block that began first, by all its threads. Peers wait for the weights in their send phases, so they must not depend on
    // a block that may not be resident yet.
    static EP_DEVICE void send(Block block, const Params& p, const CallContext& c, const Phase& phase, const Held& held,
                               bool is_loaded) {
        if constexpr (kUsesPackets)
            send_all_packets(block, p, c, phase, held, is_loaded);
        else
            send_tables(block, p, c, phase, held, is_loaded);
        phase.tell_ended(block);
    }
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::combine
