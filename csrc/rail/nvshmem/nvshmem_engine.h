// The engine `nvshmem`: windows in NVSHMEM's symmetric heap, whatever transport it has between nodes. This half knows no
// header of NVSHMEM; what does is a library of its own (library.h). docs/protocols/internode.md says how it works.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "device/owned.h"
#include "rail/engine.h"
#include "rail/nvshmem/view.h"
#include "rail/nvshmem/world.h"

namespace deep_ep::rail::nvshmem {

// What carries messages to the ranks that loads and stores do not reach; decides how large a put should be.
enum class Transport {
    kGpu,           // the GPU posts to the NIC itself: IBGDA
    kProxy,         // a thread of the host posts, in order: IBRC, UCX
    kFencingProxy,  // a thread of the host posts, and waits for a put before its flag: libfabric
};

// Of NVSHMEM_REMOTE_TRANSPORT ("" is NVSHMEM's default) and NVSHMEM_IB_ENABLE_IBGDA.
Transport transport_of(const std::string& remote_transport, bool is_ibgda_enabled);

struct NvshmemOptions {
    int rank = 0;
    int num_ranks = 1;
    size_t window_bytes = 0;  // the same on every rank
    Transport transport = Transport::kProxy;
};

class NvshmemEngine final : public Engine {
public:
    // `world`: of this process; outlives the engine. Throws TransportError where NVSHMEM cannot begin.
    NvshmemEngine(std::shared_ptr<dev::Device> device, World& world, const NvshmemOptions& options);
    // Nothing collective: the window goes back to the world, for the next engine.
    ~NvshmemEngine() override { release(0); }
    NvshmemEngine(const NvshmemEngine&) = delete;
    NvshmemEngine& operator=(const NvshmemEngine&) = delete;

    std::string name() const override;
    std::string address() const override { return introduction_; }
    // Collective over all ranks, whoever the peers are, and without a deadline: NVSHMEM has none.
    void connect(const std::vector<std::string>& addresses, const std::vector<int>& peers) override;
    Window window() const override { return window_; }  // none before connect()
    Params params() const override;                     // not before connect()
    size_t chunk_bytes() const override;
    void set(int peer, uint64_t flag, uint64_t value) override;
    void check() const override;
    Traffic sent_to(int peer) const override;
    void release(double timeout_s) override;

private:
    const std::shared_ptr<dev::Device> device_;
    World& world_;
    const NvshmemOptions options_;
    const dev::DeviceArray<Posted> posted_;
    const dev::DeviceArray<int32_t> pes_;
    const std::string introduction_;
    dev::OwnedStream stream_;  // of set()
    int window_number_ = World::kNoWindow;
    Window window_;
    bool is_every_peer_reached_ = false;  // by loads and stores
    bool is_released_ = false;

    mutable std::mutex mutex_;
    std::string failure_;
};

}  // namespace deep_ep::rail::nvshmem
