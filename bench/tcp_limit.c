/*
 * The limit that the software backend is measured against: plain blocking TCP over two processes, in C.
 *
 *   tcp_limit recv PORT BUFFER_BYTES READ_BYTES CC
 *       Listens on 127.0.0.1:PORT (0: any free port), says {"port": N}, takes one connection and reads it to its end
 *       into a prefaulted buffer of BUFFER_BYTES, round and round, by recv() calls of up to READ_BYTES.
 *   tcp_limit send HOST PORT BYTES BUFFER_BYTES CHUNK CC
 *       Sends BYTES out of a prefaulted buffer of BUFFER_BYTES, round and round, by send() calls of up to CHUNK.
 *
 * CC is the congestion control of the socket (TCP_CONGESTION), or "-" for the system's. Each mode ends with one JSON
 * line: bytes; wall_s, from the accepted connection to the end of stream (recv) or from connected to the receiver's
 * goodbye (send); cpu_s, user and system time of this process over the same span; calls, how many recv() or send() it took.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

struct figures {
    unsigned long long bytes, calls;
    double wall_s, cpu_s;
};

static void fail(const char *what)
{
    fprintf(stderr, "tcp_limit: %s: %s\n", what, strerror(errno));
    exit(1);
}

static unsigned long long number(const char *text, unsigned long long least)
{
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (errno || *end || end == text || value < least) {
        fprintf(stderr, "tcp_limit: %s is not a number of at least %llu\n", text, least);
        exit(2);
    }
    return value;
}

static double wall_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static double cpu_now(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
}

/* Private anonymous memory with every page present, so that no page fault falls into the measured span. */
static unsigned char *prefaulted(size_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        fail("mmap");
    memset(memory, 0x5a, size);
    return memory;
}

static int tcp_socket(const char *congestion)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        fail("socket");
    if (strcmp(congestion, "-") != 0 &&
        setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, congestion, (socklen_t)strlen(congestion)) < 0)
        fail("setsockopt(TCP_CONGESTION)");
    return fd;
}

static struct sockaddr_in address_of(const char *host, const char *port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)number(port, 0))};
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1) {
        fprintf(stderr, "tcp_limit: %s is not an IPv4 address\n", host);
        exit(2);
    }
    return address;
}

static void report(const struct figures *figures)
{
    printf("{\"bytes\": %llu, \"wall_s\": %.9f, \"cpu_s\": %.6f, \"calls\": %llu}\n", figures->bytes, figures->wall_s,
           figures->cpu_s, figures->calls);
}

/* Accept one connection on 127.0.0.1, after saying on which port. */
static int accept_one(const char *port, const char *congestion)
{
    struct sockaddr_in address = address_of("127.0.0.1", port);
    socklen_t length = sizeof address;
    int yes = 1, listener = tcp_socket(congestion);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(listener, (struct sockaddr *)&address, length) < 0 || listen(listener, 1) < 0)
        fail("bind or listen");
    if (getsockname(listener, (struct sockaddr *)&address, &length) < 0)
        fail("getsockname");
    printf("{\"port\": %d}\n", ntohs(address.sin_port));
    fflush(stdout);
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0)
        fail("accept");
    close(listener);
    return fd;
}

static void receive(char **argument)
{
    size_t size = number(argument[1], 1), step = number(argument[2], 1);
    if (step > size)
        step = size;
    unsigned char *buffer = prefaulted(size);
    int fd = accept_one(argument[0], argument[3]);

    struct figures figures = {0};
    double wall = wall_now(), cpu = cpu_now();
    for (size_t at = 0;;) {
        size_t room = size - at < step ? size - at : step;
        ssize_t got = recv(fd, buffer + at, room, 0);
        if (got < 0)
            fail("recv");
        figures.calls++;
        if (got == 0)
            break;
        figures.bytes += (unsigned long long)got;
        at += (size_t)got;
        if (at == size)
            at = 0;
    }
    figures.wall_s = wall_now() - wall;
    figures.cpu_s = cpu_now() - cpu;
    close(fd);
    report(&figures);
}

static void transmit(char **argument)
{
    struct sockaddr_in address = address_of(argument[0], argument[1]);
    unsigned long long left = number(argument[2], 1);
    size_t size = number(argument[3], 1), step = number(argument[4], 1);
    if (step > size)
        step = size;
    unsigned char *buffer = prefaulted(size);
    int fd = tcp_socket(argument[5]);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        fail("connect");

    struct figures figures = {0};
    double wall = wall_now(), cpu = cpu_now();
    for (size_t at = 0; left > 0;) {
        size_t piece = size - at < step ? size - at : step;
        if (piece > left)
            piece = left;
        ssize_t sent = send(fd, buffer + at, piece, MSG_NOSIGNAL);
        if (sent < 0)
            fail("send");
        figures.calls++;
        figures.bytes += (unsigned long long)sent;
        left -= (unsigned long long)sent;
        at += (size_t)sent;
        if (at == size)
            at = 0;
    }
    shutdown(fd, SHUT_WR);
    unsigned char goodbye;
    if (recv(fd, &goodbye, 1, 0) < 0)
        fail("recv");
    figures.wall_s = wall_now() - wall;
    figures.cpu_s = cpu_now() - cpu;
    close(fd);
    report(&figures);
}

int main(int count, char **argument)
{
    if (count == 6 && strcmp(argument[1], "recv") == 0) {
        receive(argument + 2);
        return 0;
    }
    if (count == 8 && strcmp(argument[1], "send") == 0) {
        transmit(argument + 2);
        return 0;
    }
    fprintf(stderr, "usage: tcp_limit recv PORT BUFFER_BYTES READ_BYTES CC\n"
                    "       tcp_limit send HOST PORT BYTES BUFFER_BYTES CHUNK CC\n");
    return 2;
}
