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

struct NvshmemOptions {
    int rank = 0;
    size_t window_bytes = 0;  // the same on every rank
};

class NvshmemEngine final : public Engine {
public:
    // `world`: of this process; outlives the engine. Throws TransportError where NVSHMEM cannot begin.
    NvshmemEngine(std::shared_ptr<dev::Device> device, World& world, const NvshmemOptions& options);
    // Nothing collective: the window goes back to the world, for the next engine.
    ~NvshmemEngine() override { release(0); }

    std::string name() const override;
    std::string address() const override { return introduction_; }
    // Collective over all ranks, whoever the peers are, and without a deadline: NVSHMEM has none.
    void connect(const std::vector<std::string>& addresses, const std::vector<int>& peers) override;
    // As connect(). Where stores reach every peer, or every GPU sees a NIC's writes in their order.
    std::vector<const uint8_t*> share_windows(const std::vector<int>& neighbours) override;
    Window window() const override { return window_; }  // none before connect()
    Params params() const override;                     // not before connect()
    size_t chunk_bytes() const override;
    void set(int peer, uint64_t flag, uint64_t value) override;
    void check() const override;
    Traffic sent_to(int peer) const override;
    void release(double timeout_s) override;

private:
    void clear_window();
    void find_reached(const std::vector<int>& peers);
    bool agree(const std::vector<int>& ranks, bool is_so);
    void* reach(int rank) const;

    const std::shared_ptr<dev::Device> device_;
    World& world_;
    const NvshmemOptions options_;
    const std::string introduction_;
    dev::DeviceArray<Posted> posted_;  // by rank, as the next two
    dev::DeviceArray<int32_t> pes_;
    std::vector<int32_t> pes_here_;  // the same, for the host
    dev::DeviceArray<char*> reached_;
    dev::OwnedStream stream_;  // of set()
    int window_number_ = World::kNoWindow;
    Window window_;
    bool is_every_peer_reached_ = false;  // by loads and stores; the same on all ranks of a rail
    bool is_released_ = false;

    mutable std::mutex mutex_;
    std::string failure_;
};

}  // namespace deep_ep::rail::nvshmem
