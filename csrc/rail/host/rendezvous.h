// How ranks of a group find each other: each listens, tells its address and a token through the group's own exchange, and
// connects to the ranks below it. Strays who do not know the tokens are turned away.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "rail/host/address.h"
#include "rail/host/descriptor.h"

namespace deep_ep::rail::host {

struct Peer {
    Descriptor socket;      // connected, does not block
    SocketAddress address;  // where it listens
};

class Rendezvous {
public:
    // Listens from now on.
    Rendezvous(int rank, uint64_t window_bytes, const SocketAddress& own);

    // Plain bytes for the other ranks.
    const std::string& blob() const { return blob_; }
    const SocketAddress& address() const { return address_; }

    // Connects to every one of `peers` and stops listening; `blobs` by rank. Throws TransportError that names who is missing
    // after `timeout_s`, and InvalidArgument for blobs that are no addresses or of windows of another size.
    std::map<int, Peer> meet(const std::vector<std::string>& blobs, const std::vector<int>& peers, double timeout_s);

private:
    const int rank_;
    const uint64_t window_bytes_;
    const SocketAddress own_;  // without a port
    Descriptor listener_;
    SocketAddress address_;
    std::string blob_;
};

}  // namespace deep_ep::rail::host
