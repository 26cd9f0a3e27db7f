// Kernels with planted faults, for the executor's own tests: each exists once right and once per mistake.
#pragma once

#include <cstdint>

#include "device/launch.h"
#include "device/prim.h"

namespace deep_ep::faults {

using prim::Order;
using prim::Scope;

// ---------------------------------------------------------------------------------------------------------------
// Message passing: one rank's warp writes 32 words and sets a flag, another rank's warp waits for it and reads them.
// ---------------------------------------------------------------------------------------------------------------
enum class Send { kRelease, kRelaxed, kGpuRelease, kSysFence, kGpuFence, kNoSyncwarp };
enum class Receive { kAcquire, kRelaxed, kGpuAcquire, kSysFence, kShuffleOnly };

struct MessageParams {
    uint32_t* data;
    uint32_t* flag;
    uint32_t* num_wrong;
};

EP_DEVICE void fill_message(uint32_t* words) { words[threadIdx.x] = threadIdx.x + 1; }

EP_DEVICE void expect_word(uint32_t word, uint32_t expected, uint32_t* num_wrong) {
    if (word != expected) prim::fetch_add<Order::kRelaxed, Scope::kSys>(num_wrong, 1u);
}

EP_DEVICE void expect_message(const uint32_t* words, uint32_t* num_wrong) {
    expect_word(words[threadIdx.x], threadIdx.x + 1, num_wrong);
}

EP_DEVICE void wait_for_flag(const uint32_t* flag) {
    while (prim::load<Order::kAcquire, Scope::kSys>(flag) == 0) prim::pause();
}

// What a warp sends by bulk store, where its lane 0 goes on.
EP_DEVICE void stage_message(uint32_t* words) {
    fill_message(words);
    prim::fence_async_shared();
    __syncwarp();
}

template <Send kHow> struct SendKernel {
    using Params = MessageParams;
    struct Shared {};
    static EP_DEVICE void run(const Params& params, Shared&) {
        fill_message(params.data);
        if constexpr (kHow != Send::kNoSyncwarp) __syncwarp();
        if (threadIdx.x != 0) return;
        if constexpr (kHow == Send::kSysFence) prim::fence<Order::kAcqRel, Scope::kSys>();
        if constexpr (kHow == Send::kGpuFence) prim::fence<Order::kAcqRel, Scope::kGpu>();
        if constexpr (kHow == Send::kRelease || kHow == Send::kNoSyncwarp) {
            prim::store<Order::kRelease, Scope::kSys>(params.flag, 1u);
        } else if constexpr (kHow == Send::kGpuRelease) {
            prim::store<Order::kRelease, Scope::kGpu>(params.flag, 1u);
        } else {
            prim::store<Order::kRelaxed, Scope::kSys>(params.flag, 1u);
        }
    }
};

template <Receive kHow> EP_DEVICE uint32_t look(const uint32_t* flag) {
    if constexpr (kHow == Receive::kAcquire || kHow == Receive::kShuffleOnly) {
        return prim::load<Order::kAcquire, Scope::kSys>(flag);
    } else if constexpr (kHow == Receive::kGpuAcquire) {
        return prim::load<Order::kAcquire, Scope::kGpu>(flag);
    } else {
        return prim::load<Order::kRelaxed, Scope::kSys>(flag);
    }
}

template <Receive kHow> struct ReceiveKernel {
    using Params = MessageParams;
    struct Shared {};
    static EP_DEVICE void run(const Params& params, Shared&) {
        if (threadIdx.x == 0) {
            while (look<kHow>(params.flag) == 0) prim::pause();
            if constexpr (kHow == Receive::kSysFence) prim::fence<Order::kAcqRel, Scope::kSys>();
        }
        if constexpr (kHow == Receive::kShuffleOnly) {
            __shfl_sync(~0u, 0, 0);  // all lanes go on after lane 0 has seen the flag, but nothing orders memory
        } else {
            __syncwarp();
        }
        expect_message(params.data, params.num_wrong);
    }
};

// ---------------------------------------------------------------------------------------------------------------
// Packets: one rank's warp sends its words without a flag, twice in the same places; another rank's warp reads them both
// times and says in between that it has.
// ---------------------------------------------------------------------------------------------------------------
enum class Packets {
    kRight,
    kUnchecked,     // reads without a look at the epoch
    kNotGivenBack,  // the sender polls relaxed for the word that says that the first ones have been read
    kGpuStore,      // scopes that do not reach the other rank
    kGpuLoad,
    kAsFlag,  // a packet stands for other data, which it does not order
};

struct PacketParams {
    prim::Packet* packets;
    uint32_t* data;
    uint32_t* flag;
    uint32_t* num_wrong;
};

EP_DEVICE uint32_t packet_value(uint32_t epoch) { return epoch * 100 + threadIdx.x; }

template <Packets kHow> struct PacketSendKernel {
    using Params = PacketParams;
    struct Shared {};
    static EP_DEVICE void run(const Params& params, Shared&) {
        constexpr Scope kScope = kHow == Packets::kGpuStore ? Scope::kGpu : Scope::kSys;
        for (uint32_t epoch = 1; epoch <= 2; ++epoch) {
            if (epoch == 2 && threadIdx.x == 0) {
                if constexpr (kHow == Packets::kNotGivenBack)
                    while (prim::load<Order::kRelaxed, Scope::kSys>(params.flag) == 0) prim::pause();
                else
                    wait_for_flag(params.flag);
            }
            __syncwarp();
            params.data[32 * epoch + threadIdx.x] = packet_value(epoch);
            prim::store_packet<kScope>(&params.packets[threadIdx.x], epoch, packet_value(epoch));
        }
    }
};

template <Packets kHow> struct PacketReceiveKernel {
    using Params = PacketParams;
    struct Shared {};
    static EP_DEVICE uint32_t take(const Params& params, uint32_t epoch) {
        constexpr Scope kScope = kHow == Packets::kGpuLoad ? Scope::kGpu : Scope::kSys;
        uint32_t value = 0;
        while (!prim::load_packet<kScope>(&params.packets[threadIdx.x], epoch, value)) {
            if constexpr (kHow == Packets::kUnchecked) break;
            prim::pause();
        }
        return kHow == Packets::kAsFlag ? params.data[32 * epoch + threadIdx.x] : value;
    }
    static EP_DEVICE void run(const Params& params, Shared&) {
        expect_word(take(params, 1), packet_value(1), params.num_wrong);
        __syncwarp();
        if (threadIdx.x == 0) prim::store<Order::kRelease, Scope::kSys>(params.flag, 1u);
        expect_word(take(params, 2), packet_value(2), params.num_wrong);
    }
};

// ---------------------------------------------------------------------------------------------------------------
// A group of two warps shares a buffer: every thread reads what its neighbour's warp wrote.
// ---------------------------------------------------------------------------------------------------------------
template <bool kHasBarrier> struct GroupKernel {
    struct Params {
        uint32_t* num_wrong;
        int rounds;
    };
    struct Shared {
        uint32_t words[128];
    };
    static EP_DEVICE void run(const Params& params, Shared& shared) {
        const int group = static_cast<int>(threadIdx.x / 64);
        for (int round = 0; round < params.rounds; ++round) {
            shared.words[threadIdx.x] = threadIdx.x * 1000 + static_cast<uint32_t>(round);
            if constexpr (kHasBarrier) prim::barrier_sync(1 + group, 64);
            const unsigned other = threadIdx.x ^ 32u;
            __syncwarp();
            expect_word(shared.words[other], other * 1000 + static_cast<uint32_t>(round), params.num_wrong);
            prim::barrier_sync(1 + group, 64);
        }
    }
};

// ---------------------------------------------------------------------------------------------------------------
// One warp sends rows from a shared staging area of two slots by bulk store.
// ---------------------------------------------------------------------------------------------------------------
enum class Stage { kRight, kNoWaitRead, kNoProxyFence };

template <Stage kHow> struct StoreKernel {
    struct Params {
        uint32_t* rows;  // [num_rows][32]
        int num_rows;
    };
    struct Shared {
        alignas(16) uint32_t slots[2][32];
    };
    static EP_DEVICE void run(const Params& params, Shared& shared) {
        for (int row = 0; row < params.num_rows; ++row) {
            uint32_t* slot = shared.slots[row % 2];
            if constexpr (kHow != Stage::kNoWaitRead) {
                if (threadIdx.x == 0) prim::bulk_wait_read<1>();
            }
            __syncwarp();
            slot[threadIdx.x] = static_cast<uint32_t>(row) * 32 + threadIdx.x;
            if constexpr (kHow != Stage::kNoProxyFence) prim::fence_async_shared();
            __syncwarp();
            if (threadIdx.x == 0) {
                prim::bulk_store(params.rows + row * 32, slot, 128);
                prim::bulk_commit();
            }
        }
        if (threadIdx.x == 0) prim::bulk_wait_read<0>();
    }
};

// ---------------------------------------------------------------------------------------------------------------
// One warp reads rows from a single stage, which is loaded again for each.
// ---------------------------------------------------------------------------------------------------------------
template <bool kHasProxyFence> struct ReloadKernel {
    struct Params {
        const uint32_t* rows;  // [num_rows][32], all zero
        int num_rows;
        uint32_t* num_wrong;
    };
    struct Shared {
        alignas(16) uint32_t words[32];
        prim::MBarrier arrived;
    };
    static EP_DEVICE void run(const Params& params, Shared& shared) {
        if (threadIdx.x == 0) {
            prim::mbarrier_init(&shared.arrived, 1);
            prim::mbarrier_init_fence();
        }
        __syncwarp();
        for (int row = 0; row < params.num_rows; ++row) {
            if (threadIdx.x == 0) {
                prim::mbarrier_arrive_expect_tx(&shared.arrived, 128);
                prim::bulk_load(shared.words, params.rows + row * 32, 128, &shared.arrived);
            }
            while (!prim::mbarrier_try_wait(&shared.arrived, static_cast<uint32_t>(row) & 1)) {
            }
            expect_word(shared.words[threadIdx.x], 0, params.num_wrong);
            if constexpr (kHasProxyFence) prim::fence_async_shared();
            __syncwarp();  // every lane's read, the next load
        }
    }
};

// ---------------------------------------------------------------------------------------------------------------
// The message again, sent by bulk store.
// ---------------------------------------------------------------------------------------------------------------
struct StagedMessage {
    using Params = MessageParams;
    struct Shared {
        alignas(16) uint32_t words[32];
    };
};

enum class Publish { kRight, kAfterReadOnly };

template <Publish kHow> struct BulkSendKernel : StagedMessage {
    static EP_DEVICE void run(const Params& params, Shared& shared) {
        stage_message(shared.words);
        if (threadIdx.x != 0) return;
        prim::bulk_store(params.data, shared.words, 128);
        prim::bulk_commit();
        if constexpr (kHow == Publish::kAfterReadOnly) {
            prim::bulk_wait_read<0>();
        } else {
            prim::bulk_wait<0>();
        }
        prim::store<Order::kRelease, Scope::kSys>(params.flag, 1u);  // completion is a proxy fence
    }
};

// A bulk store over a row that a peer has just read and given back.
struct ReadAndGiveBackKernel {
    using Params = MessageParams;
    struct Shared {};
    static EP_DEVICE void run(const Params& params, Shared&) {
        expect_word(params.data[threadIdx.x], 0, params.num_wrong);
        __syncwarp();
        if (threadIdx.x == 0) prim::store<Order::kRelease, Scope::kSys>(params.flag, 1u);
    }
};

template <bool kHasProxyFence> struct OverwriteKernel : StagedMessage {
    static EP_DEVICE void run(const Params& params, Shared& shared) {
        stage_message(shared.words);
        if (threadIdx.x != 0) return;
        wait_for_flag(params.flag);
        if constexpr (kHasProxyFence) prim::fence_async_global();
        prim::bulk_store(params.data, shared.words, 128);
        prim::bulk_commit();
        prim::bulk_wait_read<0>();
    }
};

// ---------------------------------------------------------------------------------------------------------------
// A ring of slots between two ranks. The receiver tells the sender how far it has read; telling it one slot too early
// is the mistake.
// ---------------------------------------------------------------------------------------------------------------
constexpr int kRingSlots = 4;

struct RingParams {
    uint32_t* slots;  // [kRingSlots][32]
    uint32_t* head;   // slots filled
    uint32_t* tail;   // slots free again
    uint32_t* num_wrong;
    int num_messages;
};

struct RingSendKernel {
    using Params = RingParams;
    struct Shared {};
    static EP_DEVICE void run(const Params& params, Shared&) {
        for (int i = 0; i < params.num_messages; ++i) {
            if (threadIdx.x == 0) {
                while (static_cast<int>(prim::load<Order::kAcquire, Scope::kSys>(params.tail)) + kRingSlots <= i) {
                    prim::pause();
                }
            }
            __syncwarp();
            params.slots[(i % kRingSlots) * 32 + static_cast<int>(threadIdx.x)] = static_cast<uint32_t>(i);
            __syncwarp();
            if (threadIdx.x == 0) {
                prim::store<Order::kRelease, Scope::kSys>(params.head, static_cast<uint32_t>(i) + 1);
            }
        }
    }
};

template <bool kTellsTooEarly> struct RingReceiveKernel {
    using Params = RingParams;
    struct Shared {};
    static EP_DEVICE void tell(const Params& params, int num_read) {
        __syncwarp();
        if (threadIdx.x == 0) prim::store<Order::kRelease, Scope::kSys>(params.tail, static_cast<uint32_t>(num_read));
    }
    static EP_DEVICE void run(const Params& params, Shared&) {
        for (int i = 0; i < params.num_messages; ++i) {
            if (threadIdx.x == 0) {
                while (static_cast<int>(prim::load<Order::kAcquire, Scope::kSys>(params.head)) <= i) prim::pause();
            }
            __syncwarp();
            if constexpr (kTellsTooEarly) tell(params, i + 1);
            __syncwarp();
            expect_word(params.slots[(i % kRingSlots) * 32 + static_cast<int>(threadIdx.x)], static_cast<uint32_t>(i),
                        params.num_wrong);
            if constexpr (!kTellsTooEarly) tell(params, i + 1);
        }
    }
};

// ---------------------------------------------------------------------------------------------------------------
// A rank loads by bulk copy what its peer wrote with ordinary stores.
// ---------------------------------------------------------------------------------------------------------------
enum class Load { kRight, kNoProxyFence, kNoInitFence };

template <Load kHow> struct LoadKernel {
    using Params = MessageParams;
    struct Shared {
        alignas(16) uint32_t words[32];
        prim::MBarrier arrived;
    };
    static EP_DEVICE void wait_and_fence(const Params& params) {
        wait_for_flag(params.flag);
        prim::fence_async_global();
    }
    static EP_DEVICE void run(const Params& params, Shared& shared) {
        if (threadIdx.x == 0) {
            // One fence stands after the initialisation, the other one after the acquire; neither does the other's work.
            if constexpr (kHow == Load::kNoInitFence) wait_and_fence(params);
            prim::mbarrier_init(&shared.arrived, 1);
            if constexpr (kHow != Load::kNoInitFence) prim::mbarrier_init_fence();
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            if constexpr (kHow == Load::kRight) wait_and_fence(params);
            if constexpr (kHow == Load::kNoProxyFence) wait_for_flag(params.flag);
            prim::mbarrier_arrive_expect_tx(&shared.arrived, 128);
            prim::bulk_load(shared.words, params.data, 128, &shared.arrived);
        }
        while (!prim::mbarrier_try_wait(&shared.arrived, 0)) {
        }
        expect_message(shared.words, params.num_wrong);
    }
};

}  // namespace deep_ep::faults
