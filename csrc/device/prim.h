// The seam: everything a kernel may ask of its device beyond plain CUDA C++.
//
// Kernels are written in plain CUDA style (threadIdx, blockIdx, blockDim, gridDim, __syncthreads, __syncwarp(mask),
// __shfl_sync, __shfl_xor_sync, __shfl_up_sync, __ballot_sync, __any_sync, __all_sync, __popc, __ffs: the SIMT half
// supplies the same names) plus the functions below. Each is implemented twice, in device/cuda/prim_impl.h (PTX) and
// device/simt/prim_impl.h (the executor), and tested from one source for both.
//
// Vocabulary. "generic proxy": ordinary loads and stores. "async proxy": what bulk copies do. "weak": no ordering.
// Every primitive that orders or touches memory is also a compiler barrier.
#pragma once

#include <cstdint>

#include "device/compiler.h"

namespace deep_ep::prim {
inline namespace EP_BACKEND {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullMask = 0xffffffffu;

enum class Order { kRelaxed, kAcquire, kRelease, kAcqRel };

// Who takes part in the ordering. Whatever another rank reads or writes is kSys, never less: ranks may share a GPU,
// sit on different ones, or be CPU processes.
enum class Scope { kCta, kGpu, kSys };

EP_DEVICE int lane_idx();
EP_DEVICE int warp_idx();  // in its block

// Sixteen bytes, moved by one instruction. Addresses must be 16-byte aligned.
struct alignas(16) Vec16 {
    uint32_t word[4];
};

// ---------------------------------------------------------------------------------------------------------------
// Memory. T is a 4- or 8-byte integer, naturally aligned. Any single thread may call these.
// ---------------------------------------------------------------------------------------------------------------

// O: kRelaxed or kAcquire. Acquire orders every later access of this thread after the load; other lanes of its warp
// may touch the guarded data only after a __syncwarp().                              CUDA: ld.{relaxed,acquire}.scope
template <Order O, Scope S, class T> EP_DEVICE T load(const T* ptr);

// O: kRelaxed or kRelease. Release orders every earlier access of this thread, and every access that a barrier
// (__syncwarp, __syncthreads, barrier_sync) ordered before it, before the store.     CUDA: st.{relaxed,release}.scope
template <Order O, Scope S, class T> EP_DEVICE void store(T* ptr, T value);

// Returns the old value. Any order.                                                   CUDA: atom.add
template <Order O, Scope S, class T> EP_DEVICE T fetch_add(T* ptr, T value);

// Adds one to a count below 2^31 - 1, in device memory (nvcc 13.0 crashes over one in shared memory); returns the old value, for
// which the thread waits only where it is used: the adds of a warp's threads are put together by the compiler, which then waits
// for the sum at once. Any order.                                                     CUDA: atom.inc
template <Order O, Scope S, class T> EP_DEVICE T fetch_increment(T* count);

// Sets bits; returns the old value. Any order.                                        CUDA: atom.or
template <Order O, Scope S, class T> EP_DEVICE T fetch_or(T* ptr, T bits);

// Stores `desired` if *ptr == expected; returns the old value. Any order.             CUDA: atom.cas
template <Order O, Scope S, class T> EP_DEVICE T compare_swap(T* ptr, T expected, T desired);

// O: kAcqRel only.                                                                    CUDA: fence.acq_rel.scope
template <Order O, Scope S> EP_DEVICE void fence();

// Four bytes that say for which use of their place they were written, in a word of eight. A reader that knows the number of
// the use (its `epoch`) needs no flag and no acquire: a word with another epoch is not there yet. Scalars of 8 bytes are
// the largest that PTX moves in one piece (a vector access counts as several scalar ones, in any order), so a packet is
// no larger. A place must hold nothing but packets, or zeros: epochs are never 0.
struct alignas(8) Packet {
    uint64_t bits;  // epoch << 32 | data
};

// The readers of the packet that it replaces must come before, as before any store.    CUDA: st.relaxed.scope.b64
template <Scope S> EP_DEVICE void store_packet(Packet* ptr, uint32_t epoch, uint32_t data);

// True: `data` is what a store_packet with this epoch has put there. False: no such packet is there, and `data` means
// nothing. Orders no other access, as a relaxed load does not.                         CUDA: ld.relaxed.scope.b64
template <Scope S> EP_DEVICE bool load_packet(const Packet* ptr, uint32_t epoch, uint32_t& data);

// Weak 16-byte load that does not pollute L1. The data must not be written by anyone while the kernel runs
// (inputs), because the non-coherent path may serve it.                               CUDA: ld.global.nc.L1::no_allocate
EP_DEVICE Vec16 load_input(const Vec16* ptr);

// Weak 16-byte load of data that somebody else wrote during this kernel; an acquire must come first.
//                                                                                     CUDA: ld.global.L1::no_allocate
EP_DEVICE Vec16 load_shared_with_peers(const Vec16* ptr);

// Weak 16-byte load from shared memory, in one piece: loads of its words collide in the banks.
//                                                                                     CUDA: ld.shared.v4
EP_DEVICE Vec16 load_shared(const Vec16* ptr);

// Weak 16-byte store that does not pollute L1.                                        CUDA: st.global.L1::no_allocate
EP_DEVICE void store_streaming(Vec16* ptr, Vec16 value);

// Whether there is an instruction for the next one; where this is false a call is a bug.
EP_DEVICE bool has_bf16_add();

// Adds eight bfloat16 to those at `ptr`, in the memory of this GPU, where they are: nothing comes back. To nearest, ties to even.
//                                                                                     CUDA: red.relaxed.gpu.global.add.v4.bf16x2
EP_DEVICE void add_bf16(Vec16* ptr, Vec16 value);

// ---------------------------------------------------------------------------------------------------------------
// Arithmetic
// ---------------------------------------------------------------------------------------------------------------

// Two floats as bfloat16, `low` in the lower half: to nearest, ties to even; any NaN becomes 0x7fff.
//                                                                                     CUDA: cvt.rn.bf16x2.f32
EP_DEVICE uint32_t round_to_bf16x2(float low, float high);

// Whether there is an instruction for the next one; where this is false a call is a bug.
EP_DEVICE bool has_fp8_rounding();

// Two floats as E4M3, `low` in the lower byte: to nearest, ties to even; saturates at 448; any NaN becomes 0x7f.
//                                                                                     CUDA: cvt.rn.satfinite.e4m3x2.f32
EP_DEVICE uint32_t round_to_e4m3x2(float low, float high);

// ---------------------------------------------------------------------------------------------------------------
// mbarriers: 8-byte objects in shared memory (phase, pending arrivals, pending transaction bytes).
// ---------------------------------------------------------------------------------------------------------------
struct alignas(8) MBarrier {
    uint64_t state;
};

// One thread, once, before anyone uses it: `arrivals` per phase.                      CUDA: mbarrier.init
EP_DEVICE void mbarrier_init(MBarrier* bar, uint32_t arrivals);

// After mbarrier_init and before the __syncthreads that publishes it: makes the initialisation visible to the async
// proxy.                                                                              CUDA: fence.mbarrier_init + fence.proxy.async
EP_DEVICE void mbarrier_init_fence();

// Release (cta).                                                                      CUDA: mbarrier.arrive
EP_DEVICE void mbarrier_arrive(MBarrier* bar);

// Adds `bytes` to what the current phase waits for, then arrives.                     CUDA: mbarrier.arrive.expect_tx
EP_DEVICE void mbarrier_arrive_expect_tx(MBarrier* bar, uint32_t bytes);

// True when the phase with this parity has completed; acquire (cta). May suspend for a short, bounded time. Wait with
// algo::wait_mbarrier, not with a loop of your own.                                   CUDA: mbarrier.try_wait.parity
EP_DEVICE bool mbarrier_try_wait(MBarrier* bar, uint32_t phase_parity);

// ---------------------------------------------------------------------------------------------------------------
// Bulk copies (TMA, not tensor). Minimum sm_90; where kHasBulkCopy is false a call is a bug. One elected thread issues
// and waits. `bytes` and both addresses are multiples of 16.
// ---------------------------------------------------------------------------------------------------------------
EP_DEVICE bool has_bulk_copy();

// Completes on `bar` with `bytes` transaction bytes. Reads global memory, writes shared memory, by the async proxy.
//                                                                                     CUDA: cp.async.bulk.shared::cluster.global
EP_DEVICE void bulk_load(void* shared_dst, const void* global_src, uint32_t bytes, MBarrier* bar);

// Joins this thread's current bulk group. The shared source may be reused after bulk_wait_read, the global destination
// may be published after bulk_wait.                                                   CUDA: cp.async.bulk.global.shared::cta
EP_DEVICE void bulk_store(void* global_dst, const void* shared_src, uint32_t bytes);
EP_DEVICE void bulk_commit();

// Waits until at most N of this thread's committed groups are unfinished: source read (_read) or fully done.
template <int N> EP_DEVICE void bulk_wait();
template <int N> EP_DEVICE void bulk_wait_read();

// Orders this thread's generic accesses to shared memory before later async accesses, and the other way round: after
// writes, before a bulk_store of them; after reads or writes, before a bulk_load over them.
//                                                                                     CUDA: fence.proxy.async.shared::cta
EP_DEVICE void fence_async_shared();

// The same for global memory: after an acquire, before a bulk_load of what it guards or a bulk_store over it. Not needed
// after bulk_wait: a completed bulk copy is in order with the accesses of the thread that waited for it.
//                                                                                     CUDA: fence.proxy.async.global
EP_DEVICE void fence_async_global();

// ---------------------------------------------------------------------------------------------------------------
// Execution (one-dimensional blocks)
// ---------------------------------------------------------------------------------------------------------------

// Named barrier `id` (1..15; 0 is __syncthreads) for exactly `num_threads` (a multiple of 32) threads of the block;
// acquire and release at cta scope.                                                   CUDA: barrier.cta.sync
EP_DEVICE void barrier_sync(int id, int num_threads);

// __syncwarp and __syncthreads. `file`, `line`: of whoever wants the barrier, for reports.
EP_DEVICE void sync_warp(const char* file, int line);
EP_DEVICE void sync_block(const char* file, int line);
// The same barrier; true on every thread where `answer` is true on one. One trip less than a word of shared memory.
EP_DEVICE bool sync_block_any(bool answer, const char* file, int line);

// Every thread of the warp, or of the block, calls this, and makes all such calls in the same order. Waits for nobody and
// orders nothing. `what` names what the group is about to do.
//                                                                  CUDA: nothing; SIMT: reports who stays away
EP_DEVICE void expect_warp(const char* what);
EP_DEVICE void expect_block(const char* what);

// Nanoseconds of a clock that runs on while the thread waits; comparable within one device only.
//                                                                                     CUDA: %globaltimer
EP_DEVICE uint64_t clock_ns();

// Between two polls of the same word: lets somebody else run.                         CUDA: nanosleep; SIMT: yield as "polling"
EP_DEVICE void pause();

// A wait looks at rarer things (the abort word) at each so many of its polls, a power of two. Many threads wait at once: a
// word that all of them read at each poll is a slow one, for them and for what lies beside it.  CUDA: 8; SIMT: 1
EP_DEVICE constexpr uint32_t polls_per_check();

// ---------------------------------------------------------------------------------------------------------------
// Threads of the host that work beside kernels. What a kernel releases at system scope they acquire with an atomic.
// ---------------------------------------------------------------------------------------------------------------

// A word of host-mapped memory, with what a host thread has released there by an atomic store or update; otherwise as an
// acquire at system scope.                                                            CUDA: ld.acquire.sys
template <class T> EP_DEVICE T load_from_host(const T* ptr);

// Wakes the host thread that has set *is_asleep to 1 by an atomic exchange, then looked once more at what this thread has
// released before, and now waits for the eventfd `event`. CUDA: nothing, so that thread must not sleep for long.
EP_DEVICE void wake_host(uint32_t* is_asleep, int event);

// The dynamic shared memory of this launch, 128-byte aligned.
EP_DEVICE void* dynamic_shared();

}  // namespace EP_BACKEND
}  // namespace deep_ep::prim

#include "prim_impl.h"  // device/cuda/ or device/simt/, by include path

namespace deep_ep::prim {
inline namespace EP_BACKEND {

EP_DEVICE int lane_idx() { return static_cast<int>(threadIdx.x) % kWarpSize; }
EP_DEVICE int warp_idx() { return static_cast<int>(threadIdx.x) / kWarpSize; }

}  // namespace EP_BACKEND
}  // namespace deep_ep::prim
