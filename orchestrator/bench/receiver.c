/* A webhook receiver that costs next to nothing, so that a benchmark measures the sender.
 *
 * usage: receiver FILE
 * Listens on a free port, for all of 127.0.0.0/8, and prints it. Answers every request with 204 once its body is
 * here; under /wait-MS/ MS milliseconds after its arrival; under /hang never. Appends to FILE one record of
 * 52 bytes for each: the webhook-id (36 characters), then the arrival of the request's first byte and the end of it,
 * by the answer or by the sender going away, in nanoseconds since 1970 (64 bits, this machine's byte order). Ends
 * with its standard input.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BUFFER = 1 << 16, ID = 36, EVENTS = 256, MAX_FD = 1 << 16, FLUSH_MS = 50 };
static const char ANSWER[] = "HTTP/1.1 204 No Content\r\n\r\n";
static const char WAIT[] = "POST /wait-", HANG[] = "POST /hang";

struct connection {
    size_t length;    /* bytes of requests not yet answered */
    int64_t arrived;  /* of the first of them */
    size_t waiting;   /* size of the request that is answered later; 0: none */
    int64_t answer_at;
    char id[ID];      /* its webhook-id; begins with 0: it had none */
    char data[BUFFER];
};
static struct connection *connections[MAX_FD];
static int waiting[MAX_FD], waiting_count;
static FILE *records;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static const char *header(const char *head, const char *end, const char *name) {
    size_t length = strlen(name);
    for (const char *line = head; line && line < end; line = memmem(line, end - line, "\r\n", 2), line = line ? line + 2 : NULL)
        if ((size_t)(end - line) > length && !strncasecmp(line, name, length))
            return line + length + strspn(line + length, " ");
    return NULL;
}

static void record(struct connection *c, int64_t ended) {
    if (c->id[0]) {
        fwrite(c->id, 1, ID, records);
        fwrite(&c->arrived, sizeof c->arrived, 1, records);
        fwrite(&ended, sizeof ended, 1, records);
    }
}

static int answer(int fd, struct connection *c) {
    record(c, now_ns());
    return send(fd, ANSWER, sizeof ANSWER - 1, MSG_NOSIGNAL) >= 0;
}

/* When the request that begins here is to be answered: 0 at once. */
static int64_t answer_at(const char *head, int64_t arrived) {
    if (!strncmp(head, WAIT, sizeof WAIT - 1))
        return arrived + (int64_t)strtoul(head + sizeof WAIT - 1, NULL, 10) * 1000000;
    return strncmp(head, HANG, sizeof HANG - 1) ? 0 : INT64_MAX;
}

/* Answers the requests that are complete, up to one that waits. Returns 0 if the connection is to be closed. */
static int serve(int fd, struct connection *c) {
    size_t start = 0;
    char *end;
    while (!c->waiting && (end = memmem(c->data + start, c->length - start, "\r\n\r\n", 4))) {
        const char *head = c->data + start;
        const char *size = header(head, end + 2, "content-length:");
        const char *id = header(head, end + 2, "webhook-id:");
        size_t total = (end + 4 - head) + (size ? strtoul(size, NULL, 10) : 0);
        if (total > BUFFER)
            return 0;
        if (c->length - start < total)
            break;
        c->id[0] = 0;
        if (id && id + ID <= end)
            memcpy(c->id, id, ID);
        if ((c->answer_at = answer_at(head, c->arrived))) {
            c->waiting = total;
            waiting[waiting_count++] = fd;
        } else if (!answer(fd, c))
            return 0;
        else
            start += total;
    }
    memmove(c->data, c->data + start, c->length - start);
    c->length -= start;
    return c->length < BUFFER;
}

static void forget(int fd) {
    for (int i = 0; i < waiting_count; i++)
        if (waiting[i] == fd) {
            waiting[i] = waiting[--waiting_count];
            return;
        }
}

static void end_connection(int fd) {
    if (connections[fd]->waiting) {
        record(connections[fd], now_ns());
        forget(fd);
    }
    close(fd);
    free(connections[fd]);
    connections[fd] = NULL;
}

/* Answers what has waited long enough. Returns in how many milliseconds to look again. */
static int answer_waiting(void) {
    int64_t now = now_ns(), next = now + FLUSH_MS * 1000000;
    for (int i = waiting_count; i-- > 0;) {
        int fd = waiting[i];
        struct connection *c = connections[fd];
        if (c->answer_at > now) {
            next = c->answer_at < next ? c->answer_at : next;
            continue;
        }
        forget(fd);
        size_t done = c->waiting;
        c->waiting = 0;
        if (!answer(fd, c)) {
            end_connection(fd);
            continue;
        }
        memmove(c->data, c->data + done, c->length -= done);
        c->arrived = now;
        if (!serve(fd, c))
            end_connection(fd);
    }
    return (next - now + 999999) / 1000000;
}

static void accept_all(int listener, int poll) {
    int fd, one = 1;
    struct sockaddr_in peer;
    socklen_t size = sizeof peer;
    while ((fd = accept4(listener, (struct sockaddr *)&peer, &size, SOCK_NONBLOCK)) >= 0) {
        if (ntohl(peer.sin_addr.s_addr) >> 24 != IN_LOOPBACKNET || fd >= MAX_FD || !(connections[fd] = calloc(1, sizeof **connections))) {
            close(fd);
            continue;
        }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
        epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
    }
}

int main(int count, char **arguments) {
    if (count != 2 || !(records = fopen(arguments[1], "wb"))) {
        fprintf(stderr, "usage: receiver FILE\n");
        return 2;
    }
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), poll = epoll_create1(0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_ANY)};
    socklen_t size = sizeof address;
    if (bind(listener, (struct sockaddr *)&address, size) || listen(listener, 4096) ||
        getsockname(listener, (struct sockaddr *)&address, &size)) {
        perror("receiver");
        return 1;
    }
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, events[EVENTS];
    epoll_ctl(poll, EPOLL_CTL_ADD, listener, &event);
    event.data.fd = STDIN_FILENO;
    epoll_ctl(poll, EPOLL_CTL_ADD, STDIN_FILENO, &event);
    for (int64_t flushed = 0, now;;) {
        int ready = epoll_wait(poll, events, EVENTS, answer_waiting());
        if ((now = now_ns()) - flushed > FLUSH_MS * 1000000) {
            flushed = now;
            fflush(records);
        }
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (fd == STDIN_FILENO)
                return fclose(records) != 0;
            if (fd == listener) {
                accept_all(listener, poll);
                continue;
            }
            struct connection *c = connections[fd];
            ssize_t got = recv(fd, c->data + c->length, BUFFER - c->length, 0);
            if (got > 0) {
                if (c->length == 0)
                    c->arrived = now_ns();
                c->length += got;
                if (!serve(fd, c))
                    end_connection(fd);
            } else if (got == 0 || (errno != EAGAIN && errno != EINTR))
                end_connection(fd);
        }
    }
}
