/* Clients of the API, as many as asked for, each with one keep-alive connection and one request under way.
 *
 * usage: load PORT CLIENTS REQUESTS EVENTS_PER_REQUEST SCHEDULED_AT PAYLOAD RUN [TOPIC]
 * Sends REQUESTS requests: single events, or batches when EVENTS_PER_REQUEST is over 1; every event has an
 * external_job_id of its own, RUN and a number, and is due at SCHEDULED_AT, or when it is sent if that is "now".
 * With TOPIC they are to be delivered to it, else over HTTP. Prints the seconds from the first request to the last answer, the
 * answers with a 2xx status, the events those answers report as accepted, and the 50th, 99th and 100th percentile
 * of the time to answer in milliseconds. Ends with 1 when the server closes a connection.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { ANSWER = 1 << 18, EVENT = 4096 };

struct client {
    int fd;
    size_t to_send, sent, length;
    double began;
    char *request, answer[ANSWER];
};
static long requests, started, finished, succeeded, accepted, per_request, number;
static char **arguments, due[40], target[300];
static double *took_ms;

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void set_due(void) {
    struct timespec t;
    struct tm utc;
    if (strcmp(arguments[5], "now")) {
        snprintf(due, sizeof due, "%s", arguments[5]);
        return;
    }
    clock_gettime(CLOCK_REALTIME, &t);
    gmtime_r(&t.tv_sec, &utc);
    snprintf(due + strftime(due, sizeof due, "%FT%T", &utc), 20, ".%03ldZ", t.tv_nsec / 1000000);
}

static size_t event(char *at) {
    long n = number++;
    if (!arguments[8])
        snprintf(target, sizeof target, "\"HTTP\",\"destination\":\"https://receiver-%ld.example.com/hooks\"", n % 50);
    return sprintf(at, "{\"external_job_id\":\"%s-%ld\",\"source\":\"bench\",\"scheduled_at\":\"%s\",\"delivery_type\":%s,\"payload\":%s}",
                   arguments[7], n, due, target, arguments[6]);
}

static void begin(struct client *c) {
    char *body = c->request + 256, *at = body, head[256];
    if (started++ >= requests)
        return;
    set_due();
    if (per_request > 1) {
        at += sprintf(at, "{\"events\":[");
        for (long i = 0; i < per_request; i++) {
            at += event(at);
            *at++ = i + 1 < per_request ? ',' : ']';
        }
        *at++ = '}';
    } else
        at += event(at);
    int length = sprintf(head, "POST /api/v1/events%s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n",
                         per_request > 1 ? "/batch" : "", (size_t)(at - body));
    memcpy(body - length, head, length);
    memmove(c->request, body - length, length + (at - body));
    c->to_send = length + (at - body);
    c->sent = c->length = 0;
    c->began = now_s();
}

/* Takes the answer in if it is complete. */
static int ended(struct client *c) {
    c->answer[c->length] = 0;
    char *body = strstr(c->answer, "\r\n\r\n"), *size = strcasestr(c->answer, "\r\ncontent-length:");
    if (!body || !size || c->length < (size_t)(body + 4 - c->answer) + strtoul(size + 17, NULL, 10))
        return 0;
    took_ms[finished++] = (now_s() - c->began) * 1000;
    if (c->answer[9] == '2') {
        char *count = strstr(body, "\"accepted\":");
        succeeded++;
        accepted += count ? strtol(count + 11, NULL, 10) : c->answer[11] != '0';
    }
    return 1;
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int count, char **given) {
    if (count != 8 && count != 9) {
        fprintf(stderr, "usage: load PORT CLIENTS REQUESTS EVENTS_PER_REQUEST SCHEDULED_AT PAYLOAD RUN [TOPIC]\n");
        return 2;
    }
    arguments = given;
    if (given[8])
        snprintf(target, sizeof target, "\"KAFKA\",\"destination\":\"%s\"", given[8]);
    long clients = atol(given[2]);
    requests = atol(given[3]), per_request = atol(given[4]), took_ms = calloc(requests, sizeof *took_ms);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(given[1])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int poll = epoll_create1(0), one = 1;
    double start = now_s();
    for (long i = 0; i < clients && i < requests; i++) {
        struct client *c = calloc(1, sizeof *c);
        c->request = malloc(512 + per_request * EVENT);
        c->fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(c->fd, (struct sockaddr *)&address, sizeof address)) {
            perror("load");
            return 1;
        }
        setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        begin(c);
        struct epoll_event wanted = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = c};
        epoll_ctl(poll, EPOLL_CTL_ADD, c->fd, &wanted);
    }
    while (finished < requests) {
        struct epoll_event events[256];
        int ready = epoll_wait(poll, events, 256, 10000);
        if (ready <= 0) {
            fprintf(stderr, "load: no answer for 10 s\n");
            return 1;
        }
        for (int i = 0; i < ready; i++) {
            struct client *c = events[i].data.ptr;
            ssize_t n = 1;
            while ((n = recv(c->fd, c->answer + c->length, ANSWER - 1 - c->length, MSG_DONTWAIT)) > 0) {
                c->length += n;
                if (ended(c)) {
                    c->to_send = c->sent = c->length = 0;
                    begin(c);
                    break;
                }
            }
            if (n == 0) {
                fprintf(stderr, "load: the server closed a connection\n");
                return 1;
            }
            while (c->sent < c->to_send && (n = send(c->fd, c->request + c->sent, c->to_send - c->sent, MSG_NOSIGNAL | MSG_DONTWAIT)) > 0)
                c->sent += n;
        }
    }
    double seconds = now_s() - start;
    qsort(took_ms, finished, sizeof *took_ms, compare);
    printf("%f %ld %ld %f %f %f\n", seconds, succeeded, accepted, took_ms[finished / 2], took_ms[finished * 99 / 100], took_ms[finished - 1]);
    return 0;
}
