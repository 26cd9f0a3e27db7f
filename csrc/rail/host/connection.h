// One peer of the engine `host`: what waits to be sent to it, and what is arriving from it. One thread sends, one receives.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "rail/engine.h"
#include "rail/host/address.h"
#include "rail/host/message.h"

namespace deep_ep::rail::host {

enum class Flow {
    kBlocked,  // nothing more can be done for now
    kGoesOn,   // there is more to do, but others have their turn first
    kEnded,    // nothing will ever come or go again
};

class Connection {
public:
    Connection(int peer, Descriptor socket, const SocketAddress& address, const Window& window);

    int peer() const { return peer_; }
    int fd() const { return socket_.get(); }
    std::string name() const;  // rank 3 at 10.0.0.2:4455

    // --- the sender's thread ---------------------------------------------------------------------------------
    void queue(const Header& header, const void* bytes);
    size_t num_queued() const { return queue_.size(); }
    // Sends what is queued, until the connection takes no more.
    Flow send();
    // Everything that was sent has been acknowledged by the peer's system.
    bool is_drained() const;
    void end_sending();

    // --- the receiver's thread -------------------------------------------------------------------------------
    // Takes what has come, into the window; the flag of a put after its bytes.
    Flow receive();

    // --- any thread ------------------------------------------------------------------------------------------
    // Why it has ended, unless the peer has said farewell before: "" or a sentence.
    std::string failure() const;
    bool has_ended() const { return has_ended_.load(std::memory_order_acquire); }
    bool has_left() const { return has_ended() && has_farewell_; }
    Traffic traffic() const;

private:
    struct Outgoing {
        Header header;
        const char* bytes;
        size_t num_sent;  // of header and bytes
        size_t total() const { return sizeof(Header) + header.num_bytes; }
    };

    void advance_sent(size_t count);
    size_t read_some(ssize_t& result);
    void advance_received(size_t count);
    void parse();
    void begin_message(const Header& header);
    void finish_message();
    bool is_inside(uint64_t offset, uint64_t bytes, uint64_t alignment) const;
    std::atomic_ref<uint64_t> word(uint64_t offset) const;
    Flow end(int error);

    const int peer_;
    const Descriptor socket_;
    const SocketAddress address_;
    char* const window_;
    const size_t window_bytes_;

    std::deque<Outgoing> queue_;
    bool has_send_ended_ = false;
    std::atomic<int> send_error_{0};
    std::atomic<uint64_t> num_messages_{0}, num_bytes_{0};

    Header header_{};  // of the message that is arriving
    bool is_arriving_ = false;
    size_t num_missing_ = 0;     // of its bytes
    std::vector<char> scratch_;  // what came behind them
    size_t scratch_end_ = 0;
    bool has_farewell_ = false;
    std::string complaint_;  // about what the peer sent
    int receive_error_ = 0;
    std::atomic<bool> has_ended_{false};  // written last
};

}  // namespace deep_ep::rail::host
