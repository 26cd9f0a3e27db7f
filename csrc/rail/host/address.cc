#include "rail/host/address.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <sys/ioctl.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <vector>

#include "core/error.h"

namespace deep_ep::rail::host {

namespace {

std::string describe(int error) { return concat(std::strerror(error), " (errno ", error, ")"); }

void set_option(const Descriptor& socket, int level, int name, int value, const char* text) {
    if (setsockopt(socket.get(), level, name, &value, sizeof(value)) != 0)
        throw TransportError(concat("rail: setsockopt(", text, "): ", describe(errno)));
}

struct Interface {
    std::string name;
    SocketAddress address;
};

// With an IPv4 or IPv6 address and up; IPv4 first, in the system's order otherwise.
std::vector<Interface> list_interfaces() {
    ifaddrs* first = nullptr;
    if (getifaddrs(&first) != 0) throw TransportError(concat("rail: getifaddrs: ", describe(errno)));
    const std::unique_ptr<ifaddrs, decltype(&freeifaddrs)> owner(first, freeifaddrs);
    std::vector<Interface> found;
    for (const ifaddrs* entry = first; entry != nullptr; entry = entry->ifa_next) {
        if (entry->ifa_addr == nullptr || (entry->ifa_flags & IFF_UP) == 0) continue;
        const int family = entry->ifa_addr->sa_family;
        if (family != AF_INET && family != AF_INET6) continue;
        const SocketAddress address(entry->ifa_addr, family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6));
        if (!address.is_link_local()) found.push_back({entry->ifa_name, address});  // those mean nothing to other hosts
    }
    std::stable_sort(found.begin(), found.end(), [](const Interface& a, const Interface& b) {
        return a.address.family() == AF_INET && b.address.family() != AF_INET;
    });
    return found;
}

std::string without_port(const SocketAddress& address) {
    const std::string text = address.text();
    return text.substr(0, text.rfind(':'));
}

std::string list_names(const std::vector<Interface>& interfaces) {
    std::string text;
    for (const auto& [name, address] : interfaces)
        text += concat(text.empty() ? "" : ", ", name, " (", without_port(address), ")");
    return text.empty() ? "none" : text;
}

SocketAddress address_of_interface(const std::string& interface) {
    const auto interfaces = list_interfaces();
    for (const auto& [name, address] : interfaces)
        if (name == interface || without_port(address) == interface ||
            without_port(address) == concat("[", interface, "]"))
            return address;
    throw InvalidArgument(
        concat("DEEP_EP_RAIL_INTERFACE: expected the name or the address of an interface that is up, got '", interface,
               "'; there are: ", list_names(interfaces)));
}

// Asks the routing table: a datagram socket that is connected sends nothing.
SocketAddress address_towards(const SocketAddress& target) {
    const Descriptor probe(::socket(target.family(), SOCK_DGRAM | SOCK_CLOEXEC, 0));
    if (!probe || ::connect(probe.get(), target.get(), target.length()) != 0) return {};
    return bound_address(probe);
}

SocketAddress address_that_reaches(const std::string& name) {
    addrinfo hints{};
    hints.ai_socktype = SOCK_DGRAM;
    addrinfo* first = nullptr;
    const int error = getaddrinfo(name.c_str(), "9", &hints, &first);
    EP_CHECK(error == 0, "rail: cannot find the address of '", name, "' (MASTER_ADDR): ", gai_strerror(error),
             ". DEEP_EP_RAIL_INTERFACE names the interface to use");
    const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(first, freeaddrinfo);
    for (const addrinfo* entry = first; entry != nullptr; entry = entry->ai_next) {
        if (entry->ai_family != AF_INET && entry->ai_family != AF_INET6) continue;
        const SocketAddress own = address_towards({entry->ai_addr, entry->ai_addrlen});
        if (own.length() != 0) return own;
    }
    throw InvalidArgument(concat("rail: no interface of this host reaches '", name,
                                 "' (MASTER_ADDR). DEEP_EP_RAIL_INTERFACE names the interface to use; there are: ",
                                 list_names(list_interfaces())));
}

SocketAddress first_address() {
    const auto interfaces = list_interfaces();
    for (const auto& [name, address] : interfaces)
        if (!address.is_loopback()) return address;
    EP_CHECK(!interfaces.empty(), "rail: this host has no network interface that is up");
    return interfaces.front().address;
}

SocketAddress with_port(SocketAddress address, int port) {
    sockaddr_storage storage{};
    std::memcpy(&storage, address.get(), address.length());
    const auto number = htons(static_cast<uint16_t>(port));
    if (address.family() == AF_INET) reinterpret_cast<sockaddr_in*>(&storage)->sin_port = number;
    if (address.family() == AF_INET6) reinterpret_cast<sockaddr_in6*>(&storage)->sin6_port = number;
    return {reinterpret_cast<const sockaddr*>(&storage), address.length()};
}

}  // namespace

SocketAddress::SocketAddress(const sockaddr* address, socklen_t length) {
    std::memcpy(&storage_, address, std::min<size_t>(length, sizeof(storage_)));
}

SocketAddress SocketAddress::parse(const std::string& text) {
    sockaddr_in v4{};
    sockaddr_in6 v6{};
    v4.sin_family = AF_INET;
    v6.sin6_family = AF_INET6;
    if (inet_pton(AF_INET, text.c_str(), &v4.sin_addr) == 1)
        return {reinterpret_cast<const sockaddr*>(&v4), sizeof(v4)};
    if (inet_pton(AF_INET6, text.c_str(), &v6.sin6_addr) == 1)
        return {reinterpret_cast<const sockaddr*>(&v6), sizeof(v6)};
    throw InvalidArgument(concat("expected an IPv4 or IPv6 address, got '", text, "'"));
}

socklen_t SocketAddress::length() const {
    if (family() == AF_INET) return sizeof(sockaddr_in);
    return family() == AF_INET6 ? sizeof(sockaddr_in6) : 0;
}

int SocketAddress::port() const {
    if (family() == AF_INET) return ntohs(reinterpret_cast<const sockaddr_in*>(&storage_)->sin_port);
    return ntohs(reinterpret_cast<const sockaddr_in6*>(&storage_)->sin6_port);
}

bool SocketAddress::is_loopback() const {
    if (family() == AF_INET)
        return ntohl(reinterpret_cast<const sockaddr_in*>(&storage_)->sin_addr.s_addr) >> 24 == IN_LOOPBACKNET;
    return IN6_IS_ADDR_LOOPBACK(&reinterpret_cast<const sockaddr_in6*>(&storage_)->sin6_addr);
}

bool SocketAddress::is_link_local() const {
    return family() == AF_INET6 && IN6_IS_ADDR_LINKLOCAL(&reinterpret_cast<const sockaddr_in6*>(&storage_)->sin6_addr);
}

std::string SocketAddress::text() const {
    char host[INET6_ADDRSTRLEN] = "?";
    if (family() == AF_INET) {
        inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(&storage_)->sin_addr, host, sizeof(host));
        return concat(host, ":", port());
    }
    inet_ntop(AF_INET6, &reinterpret_cast<const sockaddr_in6*>(&storage_)->sin6_addr, host, sizeof(host));
    return concat("[", host, "]:", port());
}

SocketAddress find_own_address(const std::string& interface, const std::string& reach) {
    if (!interface.empty()) return with_port(address_of_interface(interface), 0);
    return with_port(reach.empty() ? first_address() : address_that_reaches(reach), 0);
}

Descriptor listen_on(const SocketAddress& address) {
    Descriptor socket(::socket(address.family(), SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!socket || bind(socket.get(), address.get(), address.length()) != 0 || listen(socket.get(), SOMAXCONN) != 0)
        throw TransportError(concat("rail: cannot listen on ", address.text(), ": ", describe(errno)));
    return socket;
}

SocketAddress bound_address(const Descriptor& socket) {
    sockaddr_storage storage{};
    socklen_t length = sizeof(storage);
    if (getsockname(socket.get(), reinterpret_cast<sockaddr*>(&storage), &length) != 0)
        throw TransportError(concat("rail: getsockname: ", describe(errno)));
    return {reinterpret_cast<const sockaddr*>(&storage), length};
}

Descriptor begin_connect(const SocketAddress& from, const SocketAddress& to) {
    Descriptor socket(::socket(to.family(), SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!socket) throw TransportError(concat("rail: socket: ", describe(errno)));
    // From the interface that was chosen, so that an override holds for both directions.
    if (from.family() == to.family()) static_cast<void>(!bind(socket.get(), from.get(), from.length()));
    if (::connect(socket.get(), to.get(), to.length()) != 0 && errno != EINPROGRESS)
        throw TransportError(concat("rail: cannot connect to ", to.text(), ": ", describe(errno)));
    return socket;
}

void tune(const Descriptor& socket, double silence_s) {
    const int silence_ms = static_cast<int>(std::clamp(silence_s, 1.0, 86400.0) * 1000);
    const int probe_s = std::clamp(silence_ms / 4000, 1, 60);
    set_option(socket, IPPROTO_TCP, TCP_NODELAY, 1, "TCP_NODELAY");
    set_option(socket, SOL_SOCKET, SO_KEEPALIVE, 1, "SO_KEEPALIVE");
    set_option(socket, IPPROTO_TCP, TCP_KEEPIDLE, probe_s, "TCP_KEEPIDLE");
    set_option(socket, IPPROTO_TCP, TCP_KEEPINTVL, probe_s, "TCP_KEEPINTVL");
    set_option(socket, IPPROTO_TCP, TCP_KEEPCNT, 3, "TCP_KEEPCNT");
    set_option(socket, IPPROTO_TCP, TCP_USER_TIMEOUT, silence_ms, "TCP_USER_TIMEOUT");
}

int take_error(const Descriptor& socket) {
    int error = 0;
    socklen_t length = sizeof(error);
    return getsockopt(socket.get(), SOL_SOCKET, SO_ERROR, &error, &length) == 0 ? error : errno;
}

}  // namespace deep_ep::rail::host
