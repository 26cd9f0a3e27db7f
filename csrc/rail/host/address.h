// Where a rank listens: an address of one of its interfaces that the other ranks can reach.
#pragma once

#include <netinet/in.h>
#include <sys/socket.h>

#include <array>
#include <cstdint>
#include <string>

#include "rail/host/descriptor.h"

namespace deep_ep::rail::host {

// An IPv4 or IPv6 address with a port.
class SocketAddress {
public:
    SocketAddress() = default;
    SocketAddress(const sockaddr* address, socklen_t length);
    static SocketAddress parse(const std::string& text);  // an address without a port, no name; throws InvalidArgument

    const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage_); }
    socklen_t length() const;
    int family() const { return storage_.ss_family; }
    int port() const;
    bool is_loopback() const;
    bool is_link_local() const;
    std::string text() const;  // 10.0.0.1:4455, [fe80::1]:4455

private:
    sockaddr_storage storage_{};
};

// The address to listen on. `interface`: a name ("eth0") or an address of one; empty: the one from which `reach`, a host name
// or address, is reached; both empty: the first that is up and no loopback. Throws InvalidArgument when there is none.
SocketAddress find_own_address(const std::string& interface, const std::string& reach);

// Listens there, on a free port, without blocking.
Descriptor listen_on(const SocketAddress& address);
SocketAddress bound_address(const Descriptor& socket);
// A socket that does not block; is_connected: it is there already, otherwise it becomes writable when it is.
Descriptor begin_connect(const SocketAddress& from, const SocketAddress& to);
// No delay for small messages, and an end for peers that are silent: after `silence_s` without an answer.
void tune(const Descriptor& socket, double silence_s);
// 0, or the errno that the socket has to tell.
int take_error(const Descriptor& socket);

}  // namespace deep_ep::rail::host
