// One connection, with the other end in the hands of the test: what comes in pieces, too much, or not at all.
#include "rail/host/connection.h"

#include <doctest/doctest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <optional>
#include <vector>

#include "core/error.h"
#include "core/non_copyable.h"

namespace deep_ep::testing {
namespace {

using namespace rail::host;

std::vector<char> pattern(size_t size) {
    std::vector<char> data(size);
    for (size_t i = 0; i < size; ++i) data[i] = static_cast<char>(i * 7 + i / 251);
    return data;
}

class Ends : NonCopyable {
public:
    Ends() : window_(1 << 16) {
        int fds[2];
        REQUIRE_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
        far_ = fds[1];
        near_.emplace(3, Descriptor(fds[0]), SocketAddress::parse("10.0.0.2"),
                      rail::Window{window_.data(), window_.data(), window_.size() * sizeof(uint64_t)});
    }
    ~Ends() { hang_up(); }

    Connection& connection() { return *near_; }
    uint64_t word(uint64_t offset) const { return window_[offset / sizeof(uint64_t)]; }
    char* bytes(uint64_t offset) { return reinterpret_cast<char*>(window_.data()) + offset; }
    void tell(const void* data, size_t size) {
        REQUIRE_EQ(::send(far_, data, size, MSG_NOSIGNAL), static_cast<ssize_t>(size));
    }
    void tell(const Header& header) { tell(&header, sizeof(header)); }
    // A put to 4096 whose flag is the word at 8, all of it but its last bytes.
    std::vector<char> tell_put(size_t size, size_t num_held_back) {
        std::vector<char> data = pattern(size);
        tell({MessageKind::kPut, static_cast<uint32_t>(size), 4096, 8, 1});
        tell(data.data(), size - num_held_back);
        return data;
    }
    std::vector<char> hear(size_t size) {
        std::vector<char> data(size);
        REQUIRE_EQ(recv(far_, data.data(), size, MSG_WAITALL), static_cast<ssize_t>(size));
        return data;
    }
    // What has been told so far.
    void take_in() { CHECK_EQ(near_->receive(), Flow::kBlocked); }
    void hang_up() {
        if (far_ >= 0) close(far_);
        far_ = -1;
    }

private:
    std::vector<uint64_t> window_;
    std::optional<Connection> near_;
    int far_ = -1;
};

TEST_CASE("connection: a message in single bytes, then several at once") {
    Ends ends;
    const auto data = pattern(100);
    const Header put{MessageKind::kPut, 100, 1024, 8, 5};
    std::vector<char> stream(sizeof(put));
    std::memcpy(stream.data(), &put, sizeof(put));
    stream.insert(stream.end(), data.begin(), data.end());
    for (const char byte : stream) {
        CHECK_EQ(ends.word(8), 0);
        ends.tell(&byte, 1);
        ends.take_in();
    }
    CHECK_EQ(ends.word(8), 5);
    CHECK_EQ(std::memcmp(ends.bytes(1024), data.data(), data.size()), 0);

    std::vector<char> three;
    for (const Header& header : {Header{MessageKind::kPut, 0, 0, 16, 6}, Header{MessageKind::kAdd, 0, 0, 24, 2},
                                 Header{MessageKind::kAdd, 0, 0, 24, 3}}) {
        const auto* at = reinterpret_cast<const char*>(&header);
        three.insert(three.end(), at, at + sizeof(header));
    }
    ends.tell(three.data(), three.size());
    ends.take_in();
    CHECK_EQ(ends.word(16), 6);
    CHECK_EQ(ends.word(24), 5);
}

TEST_CASE("connection: a long message goes straight to its place, and what comes behind it is kept") {
    Ends ends;
    const auto data = ends.tell_put(100'000, 0);
    ends.tell({MessageKind::kPut, 0, 0, 16, 2});
    ends.take_in();
    CHECK_EQ(std::memcmp(ends.bytes(4096), data.data(), data.size()), 0);
    CHECK_EQ(ends.word(8), 1);
    CHECK_EQ(ends.word(16), 2);
}

TEST_CASE("connection: a flag is not there before the last byte of its put") {
    Ends ends;
    const auto data = ends.tell_put(50'000, 1);
    ends.take_in();
    CHECK_EQ(ends.word(8), 0);
    ends.tell(&data.back(), 1);
    ends.take_in();
    CHECK_EQ(ends.word(8), 1);
}

TEST_CASE("connection: messages that would write elsewhere end it, and say so") {
    const uint64_t window_bytes = (1 << 16) * sizeof(uint64_t);
    for (const Header& header : {
             Header{MessageKind::kPut, 1, window_bytes, 8, 1},      // behind the window
             Header{MessageKind::kPut, 2, window_bytes - 1, 8, 1},  // over its end
             Header{MessageKind::kPut, 8, ~uint64_t{0} - 3, 8, 1},  // an offset that wraps
             Header{MessageKind::kPut, 0, 0, window_bytes, 1},      // a flag behind the window
             Header{MessageKind::kAdd, 0, 0, 4, 1},                 // a word between words
             Header{static_cast<MessageKind>(9), 0, 0, 0, 1},       // of no kind
         }) {
        Ends ends;
        ends.tell(header);
        CHECK_EQ(ends.connection().receive(), Flow::kEnded);
        CHECK_NE(ends.connection().failure().find("rank 3 at 10.0.0.2:0 breaks the protocol"), std::string::npos);
    }
}

TEST_CASE("connection: an end without a farewell is a failure, also in the middle of a message") {
    for (const bool is_in_message : {false, true}) {
        Ends ends;
        if (is_in_message) ends.tell({MessageKind::kPut, 100, 0, 8, 1});
        ends.hang_up();
        CHECK_EQ(ends.connection().receive(), Flow::kEnded);
        CHECK_EQ(
            ends.connection().failure(),
            "rail: the connection to rank 3 at 10.0.0.2:0 was closed by the peer without a farewell: its process has "
            "ended");
        CHECK_EQ(ends.word(8), 0);
    }
}

TEST_CASE("connection: an end after a farewell is none") {
    Ends ends;
    ends.tell({MessageKind::kPut, 0, 0, 8, 1});
    ends.tell({MessageKind::kFarewell, 0, 0, 0, 0});
    CHECK_FALSE(ends.connection().has_left());
    ends.hang_up();
    CHECK_EQ(ends.connection().receive(), Flow::kEnded);
    CHECK_EQ(ends.connection().failure(), "");
    CHECK(ends.connection().has_left());
    CHECK_EQ(ends.word(8), 1);
}

TEST_CASE("connection: a peer that takes nothing blocks nobody, and gets everything in order later") {
    Ends ends;
    const auto data = pattern(200'000);
    std::memcpy(ends.bytes(0), data.data(), data.size());
    constexpr int kMessages = 40;
    for (int i = 0; i < kMessages; ++i)
        ends.connection().queue({MessageKind::kPut, 200'000, static_cast<uint64_t>(i), 8, 1}, ends.bytes(0));
    CHECK_EQ(ends.connection().send(), Flow::kBlocked);
    CHECK_GT(ends.connection().num_queued(), 0);
    for (int i = 0; i < kMessages; ++i) {
        std::vector<char> header;
        while (header.size() < sizeof(Header)) {
            header = ends.hear(sizeof(Header));
        }
        Header heard;
        std::memcpy(&heard, header.data(), sizeof(heard));
        CHECK_EQ(heard.dst, i);
        size_t left = 200'000;
        while (left > 0) {
            const size_t part = std::min<size_t>(left, 50'000);
            CHECK_EQ(std::memcmp(ends.hear(part).data(), data.data() + 200'000 - left, part), 0);
            left -= part;
            ends.connection().send();
        }
    }
    CHECK_EQ(ends.connection().num_queued(), 0);
    CHECK_EQ(ends.connection().traffic().num_messages, kMessages);
    CHECK_EQ(ends.connection().traffic().num_bytes, kMessages * 200'000);
}

TEST_CASE("connection: sending to a peer that is gone fails once, with errno, and drops what follows") {
    Ends ends;
    ends.hang_up();
    ends.connection().queue({MessageKind::kPut, 0, 0, 8, 1}, nullptr);
    CHECK_EQ(ends.connection().send(), Flow::kEnded);
    ends.connection().queue({MessageKind::kPut, 0, 0, 8, 1}, nullptr);
    CHECK_EQ(ends.connection().num_queued(), 0);
    CHECK_EQ(ends.connection().receive(), Flow::kEnded);
    CHECK_NE(ends.connection().failure().find("broke: Broken pipe (errno 32)"), std::string::npos);
}

}  // namespace
}  // namespace deep_ep::testing
