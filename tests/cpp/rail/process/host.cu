// Of a rank process: the engine `host`, and a bare socket.
#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <chrono>
#include <cstring>

#include "core/error.h"
#include "rail/host/host_engine.h"
#include "rail/process/engine.h"

namespace deep_ep::testing {

using rail::host::Descriptor;
using rail::host::SocketAddress;
using Clock = std::chrono::steady_clock;

std::unique_ptr<rail::Engine> make_process_engine(const std::shared_ptr<dev::Device>& device,
                                                  const ProcessOptions& options) {
    rail::host::HostOptions host;
    host.rank = options.rank;
    host.window_bytes = options.window_bytes;
    host.interface = options.interface;
    host.reach = options.reach;
    host.timeout_s = options.timeout_s;
    return std::make_unique<rail::host::HostEngine>(device, host);
}

namespace {

SocketAddress own_address() { return SocketAddress::parse("127.0.0.1"); }

Descriptor answer_peer(const Talk& talk) {
    const Descriptor listener = rail::host::listen_on(own_address());
    talk.say(concat("port ", rail::host::bound_address(listener).port()));
    pollfd polled{listener.get(), POLLIN, 0};
    EP_CHECK(poll(&polled, 1, 60'000) == 1, "nobody calls the plain socket");
    return Descriptor(accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
}

Descriptor call_peer(const Talk& talk) {
    sockaddr_in address{};
    std::memcpy(&address, own_address().get(), sizeof(address));
    address.sin_port = htons(static_cast<uint16_t>(std::stoi(talk.hear().substr(5))));
    Descriptor socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    EP_CHECK(::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0,
             "cannot call the plain socket: ", std::strerror(errno));
    return socket;
}

}  // namespace

// Blocking calls on a connection of its own, over the same slots: the least that TCP costs.
double run_plain(const rail::Engine& engine, dev::Device&, dev::Stream, const Traffic& traffic, const Workers&,
                 const Talk& talk) {
    const Places& places = traffic.places;
    const bool is_sender = traffic.rank == 0;
    const Descriptor socket = is_sender ? call_peer(talk) : answer_peer(talk);
    auto* window = static_cast<char*>(engine.window().host);
    const auto start = Clock::now();
    for (int i = 0; i < traffic.num_messages; ++i) {
        const int slot = i % places.num_slots;
        char* at = window + (is_sender ? places.staging(1, slot) : places.received(0, slot));
        for (uint32_t done = 0; done < places.slot_bytes;) {
            const ssize_t part = is_sender ? ::send(socket.get(), at + done, places.slot_bytes - done, MSG_NOSIGNAL)
                                           : recv(socket.get(), at + done, places.slot_bytes - done, 0);
            EP_CHECK(part > 0, "the plain socket broke: ", std::strerror(errno));
            done += static_cast<uint32_t>(part);
        }
    }
    char word = 0;  // the receiver has everything
    if (!is_sender) EP_CHECK(::send(socket.get(), &word, 1, MSG_NOSIGNAL) == 1, "the plain socket broke");
    if (is_sender) EP_CHECK(recv(socket.get(), &word, 1, 0) == 1, "the plain socket broke");
    return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace deep_ep::testing
