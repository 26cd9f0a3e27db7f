#include "runtime/lender.h"

#include <algorithm>
#include <functional>

#include "layout/heap.h"

namespace deep_ep::runtime {

Lender::Lender(std::shared_ptr<dev::Device> device, uint64_t num_bytes)
    : device_(std::move(device)), pool_(num_bytes) {}

void Lender::note_stream(dev::Stream stream, bool is_ours) {
    const std::lock_guard lock(mutex_);
    for (const Noted& noted : noted_)
        if (noted.stream == stream) return;
    noted_.push_back({stream, is_ours});
}

dev::OwnedEvent Lender::record(dev::Stream stream) {
    dev::OwnedEvent event;
    if (free_events_.empty()) {
        event = dev::make_event(device_);
    } else {
        event = std::move(free_events_.back());
        free_events_.pop_back();
    }
    device_->record_event(event.get(), stream);
    return event;
}

void Lender::forget(Use& use) {
    if (use.event) free_events_.push_back(std::move(use.event));
}

// Where a piece that comes back now may be in use. The next use is most likely on the stream of the last taker, and there in
// order without an event. A stream that is being captured has nothing to wait for but what it had before.
std::vector<Lender::Use> Lender::uses_now(std::optional<dev::Stream> stream) {
    std::vector<Use> uses;
    const bool is_noted = !stream.has_value() || std::any_of(noted_.begin(), noted_.end(), [&](const Noted& noted) {
        return noted.stream == *stream;
    });
    for (const Noted& noted : noted_) {
        const bool records =
            stream.has_value() && !noted.is_ours && noted.stream != last_taker_ && !is_captured(noted.stream);
        uses.push_back({noted.stream, records ? record(noted.stream) : dev::OwnedEvent()});
    }
    if (!is_noted && !is_captured(*stream)) uses.push_back({*stream, record(*stream)});
    return uses;
}

void Lender::give_back(uint64_t offset, std::optional<dev::Stream> stream) noexcept {
    const std::lock_guard lock(mutex_);
    for (Captured& captured : captured_) {
        if (captured.offset != offset) continue;
        captured.is_tensor_gone = true;
        return;
    }
    try {
        std::vector<Use> uses = uses_now(stream);
        if (uses.empty())
            pool_.give_back(offset);
        else
            returned_.push_back({offset, std::move(uses)});
    } catch (...) {
        // The driver is unloading or the context is broken: nobody will use the memory again.
    }
}

void Lender::shrink(uint64_t offset, uint64_t num_bytes) {
    const std::lock_guard lock(mutex_);
    pool_.shrink(offset, num_bytes);
}

bool Lender::has_ended(const Use& use, dev::Stream stream) {
    return use.stream == stream || (use.event && device_->query_event(use.event.get()));
}

// The uses of the piece that came back first, one by one; false where `settle` could not do it.
template <class Settle> bool Lender::settle_oldest(const Settle& settle) {
    Returned& oldest = returned_.front();
    while (!oldest.uses.empty()) {
        if (!settle(oldest.uses.back())) return false;
        forget(oldest.uses.back());
        oldest.uses.pop_back();
    }
    pool_.give_back(oldest.offset);
    returned_.pop_front();
    return true;
}

// What is free without a wait. Streams run in order, so behind a piece that is in use the others mostly are as well.
void Lender::collect(dev::Stream stream) {
    collect_graphs();
    while (!returned_.empty() && settle_oldest([&](const Use& use) { return has_ended(use, stream); })) {
    }
}

void Lender::collect_graphs() {
    const auto is_free = [](const Captured& captured) {
        return captured.is_tensor_gone && captured.is_graph_gone->load(std::memory_order_acquire);
    };
    const auto first = std::partition(captured_.begin(), captured_.end(), std::not_fn(is_free));
    for (auto captured = first; captured != captured_.end(); ++captured)
        returned_.push_back({captured->offset, uses_now(std::nullopt)});
    captured_.erase(first, captured_.end());
}

// Waits by `wait(event)`; false where there is nothing to wait for yet, as a capture has the stream.
template <class Wait> bool Lender::wait_for(const Use& use, const Wait& wait) {
    if (use.event) {
        wait(use.event.get());
        return true;
    }
    if (is_captured(use.stream)) return false;
    dev::OwnedEvent event = record(use.stream);
    wait(event.get());
    free_events_.push_back(std::move(event));  // a wait is for what the event stood for then
    return true;
}

std::vector<uint64_t> Lender::take_free(std::span<const uint64_t> sizes) {
    std::vector<uint64_t> offsets;
    for (uint64_t size : sizes) {
        const std::optional<uint64_t> offset = pool_.take(size);
        if (offset.has_value()) {
            offsets.push_back(*offset);
            continue;
        }
        for (uint64_t taken : offsets) pool_.give_back(taken);
        return {};
    }
    return offsets;
}

std::vector<uint64_t> Lender::take(std::span<const uint64_t> sizes, dev::Stream stream) {
    const std::lock_guard lock(mutex_);
    last_taker_ = stream;
    collect(stream);
    std::vector<uint64_t> found = take_free(sizes);
    std::vector<dev::Stream> joined;  // `stream` comes after all that these have now
    const auto needs_no_wait = [&](const Use& use) {
        return has_ended(use, stream) || (!use.event && std::count(joined.begin(), joined.end(), use.stream) > 0);
    };
    const auto wait = [&](dev::Event event) { device_->stream_wait_event(stream, event); };
    const auto settle = [&](const Use& use) {
        if (needs_no_wait(use)) return true;
        if (!wait_for(use, wait)) return false;
        if (!use.event) joined.push_back(use.stream);
        return true;
    };
    while (found.empty() && !returned_.empty() && settle_oldest(settle)) found = take_free(sizes);
    while (!joined.empty() && !returned_.empty() && settle_oldest(needs_no_wait)) {
    }
    return found;
}

std::vector<uint64_t> Lender::take_for_graph(std::span<const uint64_t> sizes, dev::Stream stream) {
    const std::lock_guard lock(mutex_);
    collect_graphs();
    uint64_t num_captured_bytes = 0;
    for (uint64_t size : sizes) num_captured_bytes += layout::align_up(size, LendPool::kAlignment);
    for (const Captured& captured : captured_) num_captured_bytes += pool_.size_of(captured.offset);
    if (num_captured_bytes > pool_.num_bytes() / 2) return {};
    const auto wait = [&](dev::Event event) { device_->synchronize_event(event); };
    while (!returned_.empty() && settle_oldest([&](const Use& use) { return wait_for(use, wait); })) {
    }
    const std::vector<uint64_t> found = take_free(sizes);
    if (found.empty()) return found;
    const auto is_graph_gone = device_->watch_graph(stream);
    for (uint64_t offset : found) captured_.push_back({offset, is_graph_gone, false});
    return found;
}

}  // namespace deep_ep::runtime
