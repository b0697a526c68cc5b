// The protocol of a judge, all little-endian: N, C, H, W as uint32 and the images as float32 in [0, 1], row by row; the
// answer is N, K as uint32 and the scores as float32. Over stdin and stdout, or over TCP (POSIX sockets).
#pragma once
#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iostream>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the protocol's numbers would have to be turned around");

struct Scores {
    uint32_t count = 0, classes = 0;
    std::vector<float> values;
};

// (N, C, H, W) and the pixels -> the scores; throws what is said to the user.
using Model = std::function<Scores(const uint32_t (&shape)[4], const std::vector<float>& pixels)>;

constexpr uint64_t ANNOUNCED = uint64_t(1) << 30;  // bytes that one request may announce

// Bytes that were read: fewer than `size` only where the stream has ended.
inline size_t read_whole(int stream, void* into, size_t size) {
    size_t have = 0;
    while (have < size) {
        const ssize_t count = ::read(stream, static_cast<char*>(into) + have, size - have);
        if (count == 0) break;
        if (count < 0 && errno == ECONNRESET) break;
        if (count < 0 && errno != EINTR) throw std::runtime_error(std::strerror(errno));
        if (count > 0) have += size_t(count);
    }
    return have;
}

// False where nobody reads any more.
inline bool write_whole(int stream, const void* data, size_t size) {
    for (size_t done = 0; done < size;) {
        const ssize_t count = ::write(stream, static_cast<const char*>(data) + done, size - done);
        if (count < 0 && errno != EINTR) return false;
        if (count > 0) done += size_t(count);
    }
    return true;
}

// Answers requests until the other side closes.
inline void converse(const Model& model, int reader, int writer) {
    uint32_t shape[4];
    while (const size_t have = read_whole(reader, shape, sizeof shape)) {
        if (have < sizeof shape) throw std::runtime_error("a request is cut short in its header");
        uint64_t size = 1;
        for (const uint32_t side : shape) {
            // Checked at each factor: four of them can pass 64 bits.
            if (side && size > ANNOUNCED / side) throw std::runtime_error("a request announces too many bytes");
            size *= side;
        }
        if (4 * size > ANNOUNCED) throw std::runtime_error("a request announces too many bytes");
        std::vector<float> pixels(size);
        if (read_whole(reader, pixels.data(), 4 * size) < 4 * size) throw std::runtime_error("a request is cut short");
        const Scores scores = size ? model(shape, pixels) : Scores{shape[0], 0, {}};
        const uint32_t header[2] = {scores.count, scores.classes};
        if (!write_whole(writer, header, sizeof header)) return;
        if (!write_whole(writer, scores.values.data(), 4 * scores.values.size())) return;
    }
}

// Listens at [HOST:]PORT, on loopback where no host is named; prints the address, answers each connection in a thread.
inline void serve(const Model& model, const std::string& address) {
    const size_t colon = address.rfind(':');
    std::string host = colon == std::string::npos ? "127.0.0.1" : address.substr(0, colon);
    const std::string port = colon == std::string::npos ? address : address.substr(colon + 1);
    if (host.size() > 1 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
    addrinfo hints = {}, *found = nullptr;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
    if (const int fault = getaddrinfo(host.empty() ? "127.0.0.1" : host.c_str(), port.c_str(), &hints, &found))
        throw std::runtime_error("--serve " + address + ": " + gai_strerror(fault));
    const int listener = socket(found->ai_family, found->ai_socktype, 0), yes = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(listener, found->ai_addr, found->ai_addrlen) || listen(listener, 8))
        throw std::runtime_error("--serve " + address + ": cannot listen there (" + std::strerror(errno) + ")");
    freeaddrinfo(found);
    sockaddr_storage bound = {};
    socklen_t size = sizeof bound;
    getsockname(listener, reinterpret_cast<sockaddr*>(&bound), &size);
    char name[NI_MAXHOST], number[NI_MAXSERV];
    getnameinfo(reinterpret_cast<sockaddr*>(&bound), size, name, sizeof name, number, sizeof number,
                NI_NUMERICHOST | NI_NUMERICSERV);
    const bool six = bound.ss_family == AF_INET6;
    std::cout << "tcp://" << (six ? "[" : "") << name << (six ? "]" : "") << ":" << number << std::endl;
    std::mutex turn;
    const Model one = [&](const uint32_t(&shape)[4], const std::vector<float>& pixels) {
        const std::lock_guard<std::mutex> guard(turn);
        return model(shape, pixels);
    };
    while (true) {
        const int stream = accept(listener, nullptr, nullptr);
        if (stream < 0) continue;  // it went away before it was accepted
        setsockopt(stream, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
        std::thread([stream, &one] {
            try {
                converse(one, stream, stream);
            } catch (const std::exception& error) {  // ends this conversation, not the server
                std::cerr << error.what() << std::endl;
            }
            close(stream);
        }).detach();
    }
}

// Answers on stdin and stdout; what a library prints goes to stderr, not among the scores.
inline void serve_on_stdout(const Model& model) {
    const int answers = dup(1);
    dup2(2, 1);
    converse(model, 0, answers);
}
