#include "rail/nvshmem/nvshmem_engine.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "core/error.h"
#include "rail/nvshmem/versions.h"

namespace deep_ep::rail::nvshmem {
namespace {

// What ranks tell each other.
constexpr uint64_t kYes = 1, kNo = 2;

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
    reached_ = {device_, all.size()};
    const World::Lease lease = world_.meet(all, options_.rank, pes_.get());
    window_number_ = lease.number;
    window_ = {nullptr, lease.address, options_.window_bytes};

    pes_here_ = world_.pes_of(all);
    device_->copy_now(pes_.get(), pes_here_.data(), pes_here_.size() * sizeof(int32_t));
    // The window may be one that was used before: what was under way to it has come, then all is zero, then anybody posts.
    world_.barrier(pes_.get());
    clear_window();
    world_.barrier(pes_.get());
    find_reached(peers);
    // All ranks of a rail choose the same size of chunks; every way carries a word now; and the kernel of set() is loaded, which
    // later might wait for kernels that wait for it.
    is_every_peer_reached_ = agree(peers, is_every_peer_reached_);
}

void* NvshmemEngine::reach(int rank) const {
    return world_.library().reach(window_.device, pes_here_[static_cast<size_t>(rank)]);
}

std::vector<const uint8_t*> NvshmemEngine::share_windows(const std::vector<int>& neighbours) {
    std::vector<const uint8_t*> windows;
    for (const int rank : neighbours) windows.push_back(static_cast<const uint8_t*>(reach(rank)));
    std::vector<int> others(pes_here_.size());
    std::iota(others.begin(), others.end(), 0);
    others.erase(others.begin() + options_.rank);
    const bool is_ordered = is_every_peer_reached_ || world_.library().orders_nic_for_all(window_.device);
    const bool is_so = is_ordered && std::find(windows.begin(), windows.end(), nullptr) == windows.end();
    return agree(others, is_so) ? windows : std::vector<const uint8_t*>();
}

void NvshmemEngine::clear_window() {
    device_->memset_async(window_.device, 0, window_.bytes, stream_.get());
    device_->synchronize_stream(stream_.get());
}

void NvshmemEngine::find_reached(const std::vector<int>& peers) {
    std::vector<char*> reached(pes_here_.size());
    for (const int peer : peers) reached[static_cast<size_t>(peer)] = static_cast<char*>(reach(peer));
    device_->copy_now(reached_.get(), reached.data(), reached.size() * sizeof(char*));
    is_every_peer_reached_ = std::all_of(peers.begin(), peers.end(),
                                         [&](int peer) { return reached[static_cast<size_t>(peer)] != nullptr; });
}

// Is it so on this rank and on all of `ranks`, who ask this one? Over the rail, in a window that is clear and will be again.
bool NvshmemEngine::agree(const std::vector<int>& ranks, bool is_so) {
    std::vector<int> all = ranks;
    all.push_back(options_.rank);
    for (const int rank : all) set(rank, 8 * static_cast<uint64_t>(options_.rank), is_so ? kYes : kNo);
    device_->synchronize_stream(stream_.get());
    check();
    world_.barrier(pes_.get());
    bool is_so_everywhere = true;
    for (const int rank : all) {
        uint64_t word = 0;
        device_->copy_now(&word, static_cast<const char*>(window_.device) + 8 * rank, sizeof(word));
        if (word != kYes && word != kNo)
            throw TransportError(concat("NVSHMEM: a word from rank ", rank, " to rank ", options_.rank,
                                        " has not arrived, though a barrier says so (got ", word, ")"));
        is_so_everywhere = is_so_everywhere && word == kYes;
    }
    clear_window();
    device_->memset_async(posted_.get(), 0, pes_here_.size() * sizeof(Posted), stream_.get());
    device_->synchronize_stream(stream_.get());
    world_.barrier(pes_.get());
    return is_so_everywhere;
}

Params NvshmemEngine::params() const {
    return Params::of(RailView{static_cast<char*>(window_.device), pes_.get(), posted_.get(), reached_.get(),
                               is_every_peer_reached_});
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
    const dev::CurrentDevice current(*device_);  // of the watcher's thread it is the first one
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
