// The device half of the engine `nvshmem`: the public device API of NVSHMEM and nothing else of it. Compiled into the
// engine's library alone (library.cu).
#pragma once

#include <nvshmem.h>
#include <nvshmemx.h>

#include "rail/nvshmem/view.h"

namespace deep_ep::rail {
inline namespace EP_BACKEND {

class Rail {
public:
    explicit EP_DEVICE Rail(const Params& params) : view(*reinterpret_cast<const nvshmem::RailView*>(params.bytes)) {}

    const nvshmem::RailView& view;
};

template <class T> EP_DEVICE T* at(const Rail& rail, uint64_t offset) {
    return reinterpret_cast<T*>(rail.view.window + offset);
}

namespace detail {

// One thread, as the next.
EP_DEVICE void count_message(const Rail& rail, int peer) {
    prim::fetch_add<prim::Order::kRelaxed, prim::Scope::kGpu>(&rail.view.posted[peer].num_messages, uint64_t{1});
}

EP_DEVICE void count_bytes(const Rail& rail, int peer, uint64_t num_bytes) {
    prim::fetch_add<prim::Order::kRelaxed, prim::Scope::kGpu>(&rail.view.posted[peer].num_bytes, num_bytes);
}

// One thread. To a peer that is reached by stores, NVSHMEM stores the word and orders nothing before it.
EP_DEVICE void signal(const Rail& rail, int peer, uint64_t offset, uint64_t value, int operation) {
    prim::fence<prim::Order::kAcqRel, prim::Scope::kSys>();
    nvshmemx_signal_op(at<uint64_t>(rail, offset), value, operation, rail.view.pes[peer]);
    count_message(rail, peer);
}

}  // namespace detail

// Posting waits for room inside NVSHMEM, which takes no wait of the caller's: so these never come back without having
// posted, and a transport that stands still holds them (third-party/README.md).

template <class Wait> EP_DEVICE bool put(const Rail& rail, int peer, const Copy& copy, Flag flag, const Wait&) {
    const int pe = rail.view.pes[peer];
    auto* dst = at<char>(rail, copy.dst);
    auto* src = at<const char>(rail, copy.src);
    __syncwarp();  // each lane's writes, one lane's fence
    // What other blocks wrote, too, before this warp, a NIC or a thread of the host reads it.
    if (prim::lane_idx() == 0) prim::fence<prim::Order::kAcqRel, prim::Scope::kSys>();
    __syncwarp();
    if (copy.bytes == 0) {
        if (prim::lane_idx() == 0) detail::signal(rail, peer, flag.offset, flag.value, NVSHMEM_SIGNAL_SET);
    } else {
        nvshmemx_putmem_signal_nbi_warp(dst, src, copy.bytes, at<uint64_t>(rail, flag.offset), flag.value,
                                        NVSHMEM_SIGNAL_SET, pe);
        if (prim::lane_idx() == 0) detail::count_message(rail, peer);
    }
    if (prim::lane_idx() == 0) detail::count_bytes(rail, peer, copy.bytes);
    __syncwarp();
    return true;
}

template <class Wait> EP_DEVICE bool set(const Rail& rail, int peer, Flag flag, const Wait&) {
    detail::signal(rail, peer, flag.offset, flag.value, NVSHMEM_SIGNAL_SET);
    return true;
}

template <class Wait> EP_DEVICE bool add(const Rail& rail, int peer, uint64_t counter, uint64_t n, const Wait&) {
    detail::signal(rail, peer, counter, n, NVSHMEM_SIGNAL_ADD);
    return true;
}

// A put to such a peer would be copied by the calling warp alone.
EP_DEVICE uint8_t* reach(const Rail& rail, int peer) { return reinterpret_cast<uint8_t*>(rail.view.reached[peer]); }

template <class Wait> EP_DEVICE bool tell(const Rail& rail, int peer, uint64_t num_bytes, Flag flag, const Wait& wait) {
    detail::count_bytes(rail, peer, num_bytes);
    return set(rail, peer, flag, wait);
}

EP_DEVICE void confirm(const Rail& rail, Flag flag) {
    auto* word = at<uint64_t>(rail, flag.offset);
    // Pairs with the fence before the flag, where the peer stores it itself.
    static_cast<void>(prim::load<prim::Order::kAcquire, prim::Scope::kSys>(word));
    if (rail.view.is_every_peer_reached) return;
    // Where a NIC stores it: NVSHMEM's own step that makes the bytes before it visible, if there is one on this machine.
    static_cast<void>(nvshmem_uint64_test(word, NVSHMEM_CMP_GE, flag.value));
}

EP_DEVICE void confirm_at(const Rail&, const uint64_t* word, uint64_t) {
    // Enough where windows are shared: flags come by stores, or the GPUs promise the order of a NIC's writes to all of them.
    static_cast<void>(prim::load<prim::Order::kAcquire, prim::Scope::kSys>(word));
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::rail
