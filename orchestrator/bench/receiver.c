/* A webhook receiver that costs next to nothing, so that a benchmark measures the sender.
 *
 * usage: receiver FILE
 * Listens on a free port of 127.0.0.1 and prints it. Answers every request with 204 once its body is here, and
 * appends to FILE one record of 44 bytes for each: the webhook-id (36 characters), then the arrival of the
 * request's first byte in nanoseconds since 1970 (64 bits, this machine's byte order). Ends with its standard input.
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

enum { BUFFER = 1 << 16, ID = 36, EVENTS = 256, MAX_FD = 1 << 16 };
static const char ANSWER[] = "HTTP/1.1 204 No Content\r\n\r\n";

struct connection {
    size_t length;   /* bytes of requests not yet answered */
    int64_t arrived; /* of the first of them */
    char data[BUFFER];
};
static struct connection *connections[MAX_FD];
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

/* Answers the requests that are complete. Returns 0 if the connection is to be closed. */
static int answer(int fd, struct connection *c) {
    size_t start = 0;
    char *end;
    while ((end = memmem(c->data + start, c->length - start, "\r\n\r\n", 4))) {
        const char *head = c->data + start;
        const char *size = header(head, end + 2, "content-length:");
        const char *id = header(head, end + 2, "webhook-id:");
        size_t total = (end + 4 - head) + (size ? strtoul(size, NULL, 10) : 0);
        if (total > BUFFER)
            return 0;
        if (c->length - start < total)
            break;
        if (id && id + ID <= end) {
            fwrite(id, 1, ID, records);
            fwrite(&c->arrived, sizeof c->arrived, 1, records);
        }
        if (send(fd, ANSWER, sizeof ANSWER - 1, MSG_NOSIGNAL) < 0)
            return 0;
        start += total;
    }
    memmove(c->data, c->data + start, c->length - start);
    c->length -= start;
    return 1;
}

int main(int count, char **arguments) {
    if (count != 2 || !(records = fopen(arguments[1], "wb"))) {
        fprintf(stderr, "usage: receiver FILE\n");
        return 2;
    }
    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), poll = epoll_create1(0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
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
    for (;;) {
        int ready = epoll_wait(poll, events, EVENTS, 50);
        if (ready == 0)
            fflush(records);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (fd == STDIN_FILENO)
                return fclose(records) != 0;
            if (fd == listener) {
                int client;
                while ((client = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                    if (client >= MAX_FD || !(connections[client] = calloc(1, sizeof **connections))) {
                        close(client);
                        continue;
                    }
                    setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                    event.data.fd = client;
                    epoll_ctl(poll, EPOLL_CTL_ADD, client, &event);
                }
                continue;
            }
            struct connection *c = connections[fd];
            ssize_t got = recv(fd, c->data + c->length, BUFFER - c->length, 0);
            if (got > 0) {
                if (c->length == 0)
                    c->arrived = now_ns();
                c->length += got;
                if (answer(fd, c) && c->length < BUFFER)
                    continue;
            } else if (got < 0 && (errno == EAGAIN || errno == EINTR))
                continue;
            close(fd);
            free(c);
            connections[fd] = NULL;
        }
    }
}
