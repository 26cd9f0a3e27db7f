#include "rail/nvshmem/nvshmem_engine.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "rail/nvshmem/versions.h"

namespace deep_ep::rail::nvshmem {
namespace {

std::string to_bytes(const Introduction& introduction) {
    return {reinterpret_cast<const char*>(&introduction), sizeof(introduction)};
}

Introduction from_bytes(const std::string& bytes, size_t rank) {
    EP_CHECK(bytes.size() == sizeof(Introduction), "rank ", rank, " uses another engine between nodes than nvshmem");
    Introduction introduction;
    std::memcpy(&introduction, bytes.data(), sizeof(introduction));
    return introduction;
}

}  // namespace

NvshmemEngine::NvshmemEngine(std::shared_ptr<dev::Device> device, World& world, const NvshmemOptions& options)
    : device_(std::move(device)),
      world_(world),
      options_(options),
      introduction_(to_bytes(world.introduce(options.rank, options.window_bytes))),
      stream_(device_, device_->create_stream()) {}

std::string NvshmemEngine::name() const { return "nvshmem (" + text(world_.loaded()) + ")"; }

void NvshmemEngine::connect(const std::vector<std::string>& addresses, const std::vector<int>& peers) {
    std::vector<Introduction> all;
    for (const std::string& address : addresses) all.push_back(from_bytes(address, all.size()));
    posted_ = {device_, all.size()};
    pes_ = {device_, all.size()};
    const World::Lease lease = world_.meet(all, options_.rank, pes_.get());
    window_number_ = lease.number;
    window_ = {nullptr, lease.address, options_.window_bytes};

    const std::vector<int32_t> pes = world_.pes_of(all);
    device_->copy_now(pes_.get(), pes.data(), pes.size() * sizeof(int32_t));
    const auto is_reached = [&](int peer) {
        return world_.library().is_reached(lease.address, pes[static_cast<size_t>(peer)]);
    };
    is_every_peer_reached_ = std::all_of(peers.begin(), peers.end(), is_reached);

    // The window may be one that was used before: what was under way to it has come, then all is zero, then anybody posts.
    world_.barrier(pes_.get());
    device_->memset_async(lease.address, 0, options_.window_bytes, stream_.get());
    // Loads the kernel of set() now: later that might wait for kernels that wait for it.
    set(options_.rank, 0, 0);
    device_->memset_async(posted_.get(), 0, all.size() * sizeof(Posted), stream_.get());
    device_->synchronize_stream(stream_.get());
    world_.barrier(pes_.get());
    check();
}

Params NvshmemEngine::params() const {
    return pack({static_cast<char*>(window_.device), pes_.get(), posted_.get()});
}

size_t NvshmemEngine::chunk_bytes() const {
    if (is_every_peer_reached_ || world_.transport() == Transport::kGpu) return 128 << 10;
    return world_.transport() == Transport::kProxy ? 512 << 10 : 1 << 20;
}

void NvshmemEngine::set(int peer, uint64_t flag, uint64_t value) {
    const std::lock_guard lock(mutex_);
    SetParams params{};
    params.rail = this->params();
    params.peer = peer;
    params.flag = flag;
    params.value = value;
    Complaint complaint{};
    if (!world_.library().launch_set(&params, stream_.get(), &complaint) && failure_.empty())
        failure_ = concat("rail: a word for rank ", peer, " was not sent: ", complaint.text);
}

void NvshmemEngine::check() const {
    const std::lock_guard lock(mutex_);
    if (!failure_.empty()) throw TransportError(failure_);
}

Traffic NvshmemEngine::sent_to(int peer) const {
    Posted posted{};
    device_->copy_now(&posted, posted_.get() + peer, sizeof(posted));
    return {posted.num_messages, posted.num_bytes};
}

void NvshmemEngine::release(double timeout_s) {
    if (is_released_) return;
    is_released_ = true;
    if (window_number_ == World::kNoWindow) return;
    try {
        // What set() has launched; NVSHMEM sends on by itself.
        const dev::OwnedEvent event = dev::make_event(device_);
        device_->record_event(event.get(), stream_.get());
        static_cast<void>(device_->host_wait([&] { return device_->query_event(event.get()); }, timeout_s));
    } catch (const Error&) {
        // The context is broken, or the driver unloads: nothing of ours runs any more.
    }
    window_ = {};
    world_.give_back(window_number_);
}

}  // namespace deep_ep::rail::nvshmem
