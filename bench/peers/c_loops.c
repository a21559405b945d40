/*
 * The limit that peers are measured against: the loops of bench/peers in C, over blocking sockets that Python connected.
 *
 * Called by c_loops.py, once for each part of a work. Each function returns 0, or an errno; ENODATA: the connection ended.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static int fill(int fd, char *memory, size_t size)
{
    for (size_t at = 0; at < size;) {
        ssize_t got = recv(fd, memory + at, size - at, 0);
        if (got <= 0)
            return got < 0 ? errno : ENODATA;
        at += (size_t)got;
    }
    return 0;
}

static int put(int fd, const char *memory, size_t size)
{
    for (size_t at = 0; at < size;) {
        ssize_t sent = send(fd, memory + at, size - at, MSG_NOSIGNAL);
        if (sent < 0)
            return errno;
        at += (size_t)sent;
    }
    return 0;
}

int receive_messages(int fd, char *memory, size_t size, long messages)
{
    int error = 0;
    while (!error && messages-- > 0)
        error = fill(fd, memory, size);
    return error ? error : put(fd, "\x06", 1);
}

int send_messages(int fd, const char *memory, size_t size, long messages)
{
    char answer;
    int error = 0;
    while (!error && messages-- > 0)
        error = put(fd, memory, size);
    return error ? error : fill(fd, &answer, 1);
}

int echo_messages(int fd, char *memory, size_t size, long messages)
{
    int error = 0;
    while (!error && messages-- > 0)
        if (!(error = fill(fd, memory, size)))
            error = put(fd, memory, size);
    return error;
}

/* Writes the monotonic clock, in seconds, after each round trip into laps. */
int round_trips(int fd, const char *message, char *memory, size_t size, long messages, double *laps)
{
    for (long trip = 0; trip < messages; trip++) {
        struct timespec now;
        int error = put(fd, message, size);
        if (!error)
            error = fill(fd, memory, size);
        if (error)
            return error;
        clock_gettime(CLOCK_MONOTONIC, &now);
        laps[trip] = (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
    }
    return 0;
}

struct connection {
    size_t at;
    long left;
};

/* Reads what is ready on connection i into its memory; sets *ended if that was the end of its last message. */
static int take(int fd, char *memory, size_t size, struct connection *state, int *ended)
{
    ssize_t got = recv(fd, memory + state->at, size - state->at, 0);
    if (got <= 0)
        return got < 0 ? errno : ENODATA;
    state->at += (size_t)got;
    *ended = 0;
    if (state->at < size)
        return 0;
    state->at = 0;
    *ended = --state->left == 0;
    return *ended ? put(fd, "\x06", 1) : 0;
}

/* Memory of connection i is memories[i]. */
int receive_many(const int *fds, char **memories, size_t size, long messages, int count)
{
    struct connection *state = calloc((size_t)count, sizeof *state);
    int poll = epoll_create1(EPOLL_CLOEXEC), error = state && poll >= 0 ? 0 : errno, open_count = count;
    for (int i = 0; i < count && !error; i++) {
        struct epoll_event wanted = {.events = EPOLLIN, .data.u32 = (unsigned)i};
        state[i].left = messages;
        error = epoll_ctl(poll, EPOLL_CTL_ADD, fds[i], &wanted) < 0 ? errno : 0;
    }
    while (!error && open_count > 0) {
        struct epoll_event ready[64];
        int found = epoll_wait(poll, ready, 64, -1);
        if (found < 0)
            error = errno;
        for (int at = 0; at < found && !error; at++) {
            unsigned i = ready[at].data.u32;
            int ended = 0;
            error = take(fds[i], memories[i], size, &state[i], &ended);
            if (ended) {
                epoll_ctl(poll, EPOLL_CTL_DEL, fds[i], NULL);
                open_count--;
            }
        }
    }
    close(poll);
    free(state);
    return error;
}

int send_many(const int *fds, const char *memory, size_t size, long messages, int count)
{
    char answer;
    int error = 0;
    while (!error && messages-- > 0)
        for (int i = 0; i < count && !error; i++)
            error = put(fds[i], memory, size);
    for (int i = 0; i < count && !error; i++)
        error = fill(fds[i], &answer, 1);
    return error;
}
