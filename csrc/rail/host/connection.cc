#include "rail/host/connection.h"

#include <linux/sockios.h>
#include <sys/ioctl.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/error.h"

namespace deep_ep::rail::host {

namespace {

constexpr size_t kScratchBytes = 8192;  // a message that is no longer is copied, a longer one in part
constexpr size_t kTurnBytes = 4 << 20;  // then other peers have their turn
constexpr size_t kMessagesAtOnce = 32;

}  // namespace

Connection::Connection(int peer, Descriptor socket, const SocketAddress& address, const Window& window)
    : peer_(peer),
      socket_(std::move(socket)),
      address_(address),
      window_(static_cast<char*>(window.host)),
      window_bytes_(window.bytes),
      scratch_(kScratchBytes) {}

std::string Connection::name() const { return concat("rank ", peer_, " at ", address_.text()); }

void Connection::queue(const Header& header, const void* bytes) {
    if (has_send_ended_) return;  // the receiver says why
    if (header.kind != MessageKind::kFarewell) {
        num_messages_.fetch_add(1, std::memory_order_relaxed);
        num_bytes_.fetch_add(header.num_bytes, std::memory_order_relaxed);
    }
    queue_.push_back({header, static_cast<const char*>(bytes), 0});
}

Flow Connection::send() {
    for (size_t budget = kTurnBytes; !queue_.empty() && !has_send_ended_;) {
        iovec pieces[2 * kMessagesAtOnce];
        size_t num_pieces = 0;
        for (size_t i = 0; i < std::min(queue_.size(), kMessagesAtOnce); ++i) {
            Outgoing& message = queue_[i];
            const size_t begun = std::min(message.num_sent, sizeof(Header));
            if (begun < sizeof(Header))
                pieces[num_pieces++] = {reinterpret_cast<char*>(&message.header) + begun, sizeof(Header) - begun};
            const size_t num_sent = message.num_sent - begun;
            if (num_sent < message.header.num_bytes)
                pieces[num_pieces++] = {const_cast<char*>(message.bytes) + num_sent,
                                        message.header.num_bytes - num_sent};
        }
        msghdr header{};
        header.msg_iov = pieces;
        header.msg_iovlen = num_pieces;
        const ssize_t count = sendmsg(fd(), &header, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return Flow::kBlocked;
        if (count < 0) {
            send_error_.store(errno, std::memory_order_relaxed);
            end_sending();
            return Flow::kEnded;
        }
        advance_sent(static_cast<size_t>(count));
        if (static_cast<size_t>(count) >= budget) return Flow::kGoesOn;
        budget -= static_cast<size_t>(count);
    }
    return has_send_ended_ ? Flow::kEnded : Flow::kBlocked;
}

void Connection::advance_sent(size_t count) {
    while (count > 0) {
        Outgoing& message = queue_.front();
        const size_t part = std::min(count, message.total() - message.num_sent);
        message.num_sent += part;
        count -= part;
        if (message.num_sent == message.total()) queue_.pop_front();
    }
}

bool Connection::is_drained() const {
    int num_unacknowledged = 0;
    return queue_.empty() && (ioctl(fd(), SIOCOUTQ, &num_unacknowledged) != 0 || num_unacknowledged == 0);
}

// The receiver sees the end of the connection when the system does, or what the peer still has to say.
void Connection::end_sending() {
    has_send_ended_ = true;
    queue_.clear();
    shutdown(fd(), SHUT_WR);
}

Flow Connection::receive() {
    for (size_t budget = kTurnBytes;;) {
        ssize_t result = 0;
        const size_t count = read_some(result);
        if (result < 0 && errno == EINTR) continue;
        if (result < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return Flow::kBlocked;
        if (result <= 0) return end(result < 0 ? errno : 0);
        advance_received(count);
        if (!complaint_.empty()) return end(0);
        if (count >= budget) return Flow::kGoesOn;
        budget -= count;
    }
}

// The rest of a message straight into the window, and what comes behind it into the scratch space.
size_t Connection::read_some(ssize_t& result) {
    iovec pieces[2];
    int num_pieces = 0;
    if (num_missing_ > 0)
        pieces[num_pieces++] = {window_ + header_.dst + header_.num_bytes - num_missing_, num_missing_};
    pieces[num_pieces++] = {scratch_.data() + scratch_end_, scratch_.size() - scratch_end_};
    msghdr header{};
    header.msg_iov = pieces;
    header.msg_iovlen = static_cast<size_t>(num_pieces);
    result = recvmsg(fd(), &header, MSG_DONTWAIT);
    return result < 0 ? 0 : static_cast<size_t>(result);
}

void Connection::advance_received(size_t count) {
    const size_t in_place = std::min(count, num_missing_);
    num_missing_ -= in_place;
    scratch_end_ += count - in_place;
    if (is_arriving_ && num_missing_ == 0) finish_message();
    if (!is_arriving_) parse();
}

void Connection::parse() {
    size_t at = 0;
    while (!is_arriving_ && complaint_.empty() && scratch_end_ - at >= sizeof(Header)) {
        Header header;
        std::memcpy(&header, scratch_.data() + at, sizeof(header));
        at += sizeof(header);
        begin_message(header);
        if (!is_arriving_) continue;
        const size_t here = std::min(num_missing_, scratch_end_ - at);
        std::memcpy(window_ + header_.dst, scratch_.data() + at, here);
        at += here;
        num_missing_ -= here;
        if (num_missing_ == 0) finish_message();
    }
    std::memmove(scratch_.data(), scratch_.data() + at, scratch_end_ - at);
    scratch_end_ -= at;
}

void Connection::begin_message(const Header& header) {
    if (header.kind == MessageKind::kFarewell) {
        has_farewell_ = true;
        return;
    }
    const bool is_known = header.kind == MessageKind::kPut || header.kind == MessageKind::kAdd;
    if (!is_known || !is_inside(header.flag, sizeof(uint64_t), sizeof(uint64_t)) ||
        (header.num_bytes > 0 && !is_inside(header.dst, header.num_bytes, 1))) {
        complaint_ =
            concat("it sent a message of kind ", static_cast<uint32_t>(header.kind), " for ", header.num_bytes,
                   " bytes at ", header.dst, " and the word at ", header.flag, " of a window of ", window_bytes_);
        return;
    }
    header_ = header;
    num_missing_ = header.num_bytes;
    is_arriving_ = true;
}

void Connection::finish_message() {
    is_arriving_ = false;
    // Release: the bytes. Pairs with: rail::confirm in a kernel.
    if (header_.kind == MessageKind::kAdd) {
        word(header_.flag).fetch_add(header_.value, std::memory_order_acq_rel);
    } else {
        word(header_.flag).store(header_.value, std::memory_order_release);
    }
}

bool Connection::is_inside(uint64_t offset, uint64_t bytes, uint64_t alignment) const {
    return offset % alignment == 0 && offset <= window_bytes_ && bytes <= window_bytes_ - offset;
}

std::atomic_ref<uint64_t> Connection::word(uint64_t offset) const {
    return std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(window_ + offset));
}

Flow Connection::end(int error) {
    receive_error_ = error;
    has_ended_.store(true, std::memory_order_release);
    return Flow::kEnded;
}

std::string Connection::failure() const {
    if (!has_ended()) return "";
    if (!complaint_.empty()) return concat("rail: ", name(), " breaks the protocol: ", complaint_);
    if (has_farewell_) return "";
    const int send_error = send_error_.load(std::memory_order_relaxed);
    const int error = receive_error_ != 0 ? receive_error_ : send_error;
    if (error == 0)
        return concat("rail: the connection to ", name(),
                      " was closed by the peer without a farewell: its process has ended");
    return concat("rail: the connection to ", name(), " broke: ", std::strerror(error), " (errno ", error, ")");
}

Traffic Connection::traffic() const {
    return {num_messages_.load(std::memory_order_relaxed), num_bytes_.load(std::memory_order_relaxed)};
}

}  // namespace deep_ep::rail::host
