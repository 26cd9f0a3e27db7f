// Of a rank process: the engine `nvshmem`, and bare puts.
#include <nvshmem.h>
#include <nvshmemx.h>

#include <chrono>

#include "device/launch.h"
#include "rail/nvshmem/linked_world.h"
#include "rail/nvshmem/nvshmem_engine.h"
#include "rail/process/engine.h"

namespace deep_ep::testing {

using Clock = std::chrono::steady_clock;

std::unique_ptr<rail::Engine> make_process_engine(const std::shared_ptr<dev::Device>& device,
                                                  const ProcessOptions& options) {
    return std::make_unique<rail::nvshmem::NvshmemEngine>(
        device, linked_world(),
        rail::nvshmem::NvshmemOptions{.rank = options.rank, .window_bytes = options.window_bytes});
}

namespace {

// The same chunks between the same slots, with nothing that says when one has arrived or may be overwritten; at the end
// the sender waits until all are there.
template <bool kAreBlocks> struct PlainKernel : TrafficKernel<PlainKernel<kAreBlocks>> {
    static EP_DEVICE void take_part(const Traffic& p, const rail::Rail& rail, const Patience&) {
        const int block = static_cast<int>(blockIdx.x), num_blocks = static_cast<int>(gridDim.x);
        for (int i = kAreBlocks ? block : worker_idx(); i < p.num_messages;
             i += kAreBlocks ? num_blocks : num_workers()) {
            const int slot = i % p.places.num_slots;
            auto* to = rail::at<char>(rail, p.places.received(0, slot));
            auto* from = rail::at<char>(rail, p.places.staging(1, slot));
            if constexpr (kAreBlocks)
                nvshmemx_putmem_nbi_block(to, from, p.places.slot_bytes, rail.view.pes[1]);
            else
                nvshmemx_putmem_nbi_warp(to, from, p.places.slot_bytes, rail.view.pes[1]);
        }
        __syncthreads();
        if (threadIdx.x == 0) nvshmem_quiet();
    }
};

}  // namespace

double run_plain(const rail::Engine&, dev::Device& device, dev::Stream stream, const Traffic& traffic,
                 const Workers& workers, const Talk&) {
    if (traffic.rank != 0) return 0;
    dev::LaunchConfig config;
    config.num_threads = workers.num_warps * prim::kWarpSize;
    config.num_blocks = workers.num_blocks;
    config.name = "plain puts";
    const dev::CurrentDevice current(device);
    const auto start = Clock::now();
    if (workers.are_blocks)
        dev::launch<PlainKernel<true>>(config, stream, traffic);
    else
        dev::launch<PlainKernel<false>>(config, stream, traffic);
    device.synchronize_stream(stream);
    return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace deep_ep::testing
