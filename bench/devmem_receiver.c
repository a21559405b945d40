/*
 * What our kernel backend's receiver is measured against: a minimal devmem TCP receiver, in C.
 *
 *   devmem_receiver PORT READ_BYTES LOWAT_BYTES WARM_BYTES one|batch
 *       Listens on [::]:PORT, takes one connection and receives it to its end by recvmsg(MSG_SOCK_DEVMEM) of up to
 *       READ_BYTES, each of which waits for LOWAT_BYTES (SO_RCVLOWAT) or the end. one: each frag's token goes back by a
 *       setsockopt(SO_DEVMEM_DONTNEED) of its own. batch: the tokens of a recvmsg go back as ranges, up to 128 ranges
 *       and 1024 frags a call.
 *
 * The NIC is set up and the buffer bound by another process: receiving needs no privilege. Ends with one JSON line, of
 * what came after the first WARM_BYTES: bytes, of which dmabuf, linear and ordinary; frags, recv_calls, dontneed_calls;
 * wall_s to the end of stream, user_s and system_s of this process over that span; undisturbed_s_per_gib, the lower
 * quartile of the same time of single reads, with the return of their tokens, for each byte of theirs; and start_s, the
 * time of this process for the bytes before.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum {
    OPT_DONTNEED = 80,
    CMSG_LINEAR = 78,
    CMSG_DMABUF = 79,
    FLAG_DEVMEM = 0x2000000,
    MAX_RANGES = 128,
    MAX_FRAGS = 1024,
    CONTROL_BYTES = 1 << 18,
    MAX_READS = 1 << 16, /* of which the time is kept */
};

struct frag_message {
    uint64_t offset;
    uint32_t size, token, dmabuf_id, flags;
};

struct token_range {
    uint32_t start, count;
};

struct figures {
    unsigned long long dmabuf, linear, ordinary, frags, recv_calls, dontneed_calls;
};

static void fail(const char *what)
{
    fprintf(stderr, "devmem_receiver: %s: %s\n", what, errno == 525 ? "control space too small" : strerror(errno));
    exit(1);
}

static unsigned long number(const char *text)
{
    char *end;
    errno = 0;
    unsigned long value = strtoul(text, &end, 10);
    if (errno || *end || end == text) {
        fprintf(stderr, "devmem_receiver: %s is not a number\n", text);
        exit(2);
    }
    return value;
}

static double seconds(struct timeval time)
{
    return (double)time.tv_sec + (double)time.tv_usec * 1e-6;
}

static double wall_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static double cpu_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static int ascending(const void *one, const void *other)
{
    double first = *(const double *)one, second = *(const double *)other;
    return (first > second) - (first < second);
}

static double lower_quartile(double *values, size_t count)
{
    qsort(values, count, sizeof *values, ascending);
    return count ? values[count / 4] : 0;
}

static int accept_one(unsigned long port)
{
    struct sockaddr_in6 address = {.sin6_family = AF_INET6, .sin6_addr = in6addr_any, .sin6_port = htons((uint16_t)port)};
    int yes = 1, listener = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0)
        fail("socket");
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, 1) < 0)
        fail("bind or listen");
    printf("{\"port\": %lu}\n", port);
    fflush(stdout);
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0)
        fail("accept");
    close(listener);
    return fd;
}

static unsigned long long received(const struct figures *figures)
{
    return figures->dmabuf + figures->linear + figures->ordinary;
}

static void give_back(int fd, const struct token_range *ranges, size_t count, unsigned frags, struct figures *figures)
{
    int freed = setsockopt(fd, SOL_SOCKET, OPT_DONTNEED, ranges, (socklen_t)(count * sizeof *ranges));
    if (freed < 0)
        fail("setsockopt(SO_DEVMEM_DONTNEED)");
    if ((unsigned)freed != frags) {
        fprintf(stderr, "devmem_receiver: %u tokens were out, %d came back\n", frags, freed);
        exit(1);
    }
    figures->dontneed_calls++;
}

/* Count one recvmsg's frags and return their tokens; returns how many of its bytes a control message told of. */
static unsigned long long take(int fd, struct msghdr *message, int batch, struct figures *figures)
{
    struct token_range ranges[MAX_RANGES];
    size_t count = 0;
    unsigned held = 0;
    unsigned long long told = 0;
    for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part; part = CMSG_NXTHDR(message, part)) {
        struct frag_message frag;
        if (part->cmsg_level != SOL_SOCKET || (part->cmsg_type != CMSG_DMABUF && part->cmsg_type != CMSG_LINEAR))
            continue;
        memcpy(&frag, CMSG_DATA(part), sizeof frag);
        figures->frags++;
        told += frag.size;
        if (part->cmsg_type == CMSG_LINEAR) {
            figures->linear += frag.size;
            continue;
        }
        figures->dmabuf += frag.size;
        if (count && frag.token == ranges[count - 1].start + ranges[count - 1].count && held < MAX_FRAGS) {
            ranges[count - 1].count++;
        } else {
            if (count == MAX_RANGES || held == MAX_FRAGS) {
                give_back(fd, ranges, count, held, figures);
                count = held = 0;
            }
            ranges[count++] = (struct token_range){.start = frag.token, .count = 1};
        }
        held++;
        if (!batch) {
            give_back(fd, ranges, count, held, figures);
            count = held = 0;
        }
    }
    if (count)
        give_back(fd, ranges, count, held, figures);
    return told;
}

int main(int count, char **argument)
{
    if (count != 6 || (strcmp(argument[5], "one") != 0 && strcmp(argument[5], "batch") != 0)) {
        fprintf(stderr, "usage: devmem_receiver PORT READ_BYTES LOWAT_BYTES WARM_BYTES one|batch\n");
        return 2;
    }
    size_t read_bytes = number(argument[2]), warm_bytes = number(argument[4]);
    int lowat = (int)number(argument[3]), batch = strcmp(argument[5], "batch") == 0;
    unsigned char *inline_bytes = malloc(read_bytes), *control = malloc(CONTROL_BYTES);
    if (!inline_bytes || !control)
        fail("malloc");
    int fd = accept_one(number(argument[1]));
    if (setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &lowat, sizeof lowat) < 0)
        fail("setsockopt(SO_RCVLOWAT)");

    static double spent[MAX_READS];
    size_t reads = 0;
    struct figures figures = {0};
    struct rusage before, after;
    getrusage(RUSAGE_SELF, &before);
    double wall = wall_now(), start_s = 0, accepted = cpu_now();
    for (;;) {
        double start = cpu_now();
        struct iovec place = {.iov_base = inline_bytes, .iov_len = read_bytes};
        struct msghdr message = {
            .msg_iov = &place, .msg_iovlen = 1, .msg_control = control, .msg_controllen = CONTROL_BYTES};
        ssize_t got = recvmsg(fd, &message, FLAG_DEVMEM);
        if (got < 0)
            fail("recvmsg");
        figures.recv_calls++;
        if (got == 0)
            break;
        figures.ordinary += (unsigned long long)got - take(fd, &message, batch, &figures);
        if (reads < MAX_READS)
            spent[reads++] = (cpu_now() - start) / (double)got;
        if (start_s == 0 && received(&figures) >= warm_bytes) {
            start_s = cpu_now() - accepted;
            figures = (struct figures){0};
            reads = 0;
            getrusage(RUSAGE_SELF, &before);
            wall = wall_now();
        }
    }
    wall = wall_now() - wall;
    getrusage(RUSAGE_SELF, &after);
    close(fd);
    printf("{\"bytes\": %llu, \"dmabuf_bytes\": %llu, \"linear_bytes\": %llu, \"host_bytes\": %llu, \"frags\": %llu, "
           "\"recv_calls\": %llu, \"dontneed_calls\": %llu, \"wall_s\": %.9f, \"user_s\": %.6f, \"system_s\": %.6f, "
           "\"undisturbed_s_per_gib\": %.6f, \"start_s\": %.6f}\n",
           received(&figures), figures.dmabuf, figures.linear, figures.ordinary,
           figures.frags, figures.recv_calls, figures.dontneed_calls, wall,
           seconds(after.ru_utime) - seconds(before.ru_utime), seconds(after.ru_stime) - seconds(before.ru_stime),
           lower_quartile(spent, reads) * (1 << 30), start_s);
    return 0;
}
