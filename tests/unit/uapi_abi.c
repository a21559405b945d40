/*
 * Prints the kernel's ABI as this machine's C compiler and headers have it, one name=value a line: numbers in decimal,
 * bytes in hex. uapi_abi.golden holds what it prints; test_uapi.py compares both with the Python package.
 *
 * Names are the kernel's. What headers before Linux 6.12 lack is declared here.
 */

#define _GNU_SOURCE
#include <stddef.h>
#include <linux/uio.h> /* its struct iovec is the C library's: say so before the library declares its own */
#define __iovec_defined 1
#define __DEFINED_struct_iovec

#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>

#include <linux/dma-buf.h>
#include <linux/dma-heap.h>
#include <linux/errqueue.h>
#include <linux/genetlink.h>
#include <linux/netlink.h>
#include <linux/udmabuf.h>

#ifndef SO_DEVMEM_DONTNEED
#define SO_DEVMEM_LINEAR 78
#define SCM_DEVMEM_LINEAR SO_DEVMEM_LINEAR
#define SO_DEVMEM_DMABUF 79
#define SCM_DEVMEM_DMABUF SO_DEVMEM_DMABUF
#define SO_DEVMEM_DONTNEED 80

struct dmabuf_cmsg {
	__u64 frag_offset;
	__u32 frag_size;
	__u32 frag_token;
	__u32 dmabuf_id;
	__u32 flags;
};

struct dmabuf_token {
	__u32 token_start;
	__u32 token_count;
};
#endif

#ifndef MSG_SOCK_DEVMEM
#define MSG_SOCK_DEVMEM 0x2000000
#endif

#ifndef SO_EE_CODE_ZEROCOPY_COPIED
#define SO_EE_CODE_ZEROCOPY_COPIED 1
#endif

#define FOREIGN_LEVEL 6 /* SOL_TCP */
#define FOREIGN_TYPE 36 /* TCP_CM_INQ: four bytes of data, so four of padding */

#define PRINT_NUMBER(name) print_number(#name, (unsigned long long)(name))
#define PRINT_OFFSET(type, member) \
	print_number("offsetof(struct " #type ", " #member ")", offsetof(struct type, member))
#define PRINT_SIZE(type) print_number("sizeof(struct " #type ")", sizeof(struct type))

static void print_number(const char *name, unsigned long long number)
{
	printf("%s=%llu\n", name, number);
}

static void print_bytes(const char *name, const void *bytes, size_t size)
{
	const unsigned char *byte = bytes;

	printf("%s=", name);
	for (size_t i = 0; i < size; i++)
		printf("%02x", byte[i]);
	printf("\n");
}

static void print_constants(void)
{
	PRINT_NUMBER(SOL_SOCKET);
	PRINT_NUMBER(SO_ZEROCOPY);
	PRINT_NUMBER(SO_INCOMING_NAPI_ID);
	PRINT_NUMBER(SO_DEVMEM_LINEAR);
	PRINT_NUMBER(SO_DEVMEM_DMABUF);
	PRINT_NUMBER(SO_DEVMEM_DONTNEED);
	PRINT_NUMBER(SCM_DEVMEM_LINEAR);
	PRINT_NUMBER(SCM_DEVMEM_DMABUF);
	PRINT_NUMBER(MSG_SOCK_DEVMEM);
	PRINT_NUMBER(MSG_ZEROCOPY);
	PRINT_NUMBER(UIO_MAXIOV);
	PRINT_NUMBER(CMSG_LEN(0));
	PRINT_NUMBER(CMSG_LEN(24));
	PRINT_NUMBER(CMSG_SPACE(24));
	PRINT_NUMBER(CMSG_ALIGN(1));

	PRINT_NUMBER(SOL_IP);
	PRINT_NUMBER(IP_RECVERR);
	PRINT_NUMBER(SOL_IPV6);
	PRINT_NUMBER(IPV6_RECVERR);
	PRINT_NUMBER(SO_EE_ORIGIN_ZEROCOPY);
	PRINT_NUMBER(SO_EE_CODE_ZEROCOPY_COPIED);

	PRINT_NUMBER(UDMABUF_CREATE);
	PRINT_NUMBER(UDMABUF_CREATE_LIST);
	PRINT_NUMBER(UDMABUF_FLAGS_CLOEXEC);
	PRINT_NUMBER(DMA_HEAP_IOCTL_ALLOC);
	PRINT_NUMBER(O_RDWR);
	PRINT_NUMBER(O_CLOEXEC);
	PRINT_NUMBER(DMA_BUF_IOCTL_SYNC);
	PRINT_NUMBER(DMA_BUF_SYNC_READ);
	PRINT_NUMBER(DMA_BUF_SYNC_WRITE);
	PRINT_NUMBER(DMA_BUF_SYNC_RW);
	PRINT_NUMBER(DMA_BUF_SYNC_START);
	PRINT_NUMBER(DMA_BUF_SYNC_END);
}

static void print_layouts(void)
{
	PRINT_SIZE(cmsghdr);
	PRINT_OFFSET(cmsghdr, cmsg_len);
	PRINT_OFFSET(cmsghdr, cmsg_level);
	PRINT_OFFSET(cmsghdr, cmsg_type);

	PRINT_SIZE(dmabuf_cmsg);
	PRINT_OFFSET(dmabuf_cmsg, frag_offset);
	PRINT_OFFSET(dmabuf_cmsg, frag_size);
	PRINT_OFFSET(dmabuf_cmsg, frag_token);
	PRINT_OFFSET(dmabuf_cmsg, dmabuf_id);
	PRINT_OFFSET(dmabuf_cmsg, flags);

	PRINT_SIZE(dmabuf_token);
	PRINT_OFFSET(dmabuf_token, token_start);
	PRINT_OFFSET(dmabuf_token, token_count);

	PRINT_SIZE(sock_extended_err);
	PRINT_SIZE(udmabuf_create);
	PRINT_SIZE(udmabuf_create_list);
	PRINT_SIZE(udmabuf_create_item);
	PRINT_SIZE(dma_heap_allocation_data);
	PRINT_SIZE(dma_buf_sync);
}

/* Every field has a value of its own, so that swapped fields show. */
static void print_examples(void)
{
	struct cmsghdr header = { .cmsg_len = CMSG_LEN(24), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_DEVMEM_DMABUF };
	struct dmabuf_cmsg frag = { .frag_offset = 0x123456789000, .frag_size = 4096, .frag_token = 0x80000001,
				    .dmabuf_id = 3, .flags = 0x55667788 };
	struct dmabuf_token tokens[] = { { .token_start = 1, .token_count = 128 },
					 { .token_start = 0xfffffffe, .token_count = 2 } };
	struct sock_extended_err error = { .ee_errno = 0, .ee_origin = SO_EE_ORIGIN_ZEROCOPY,
					   .ee_code = SO_EE_CODE_ZEROCOPY_COPIED,
					   .ee_info = 0xfffffffe, .ee_data = 7 };
	struct sock_extended_err icmp = { .ee_errno = 111, .ee_origin = SO_EE_ORIGIN_ICMP, .ee_type = 3, .ee_code = 4,
					  .ee_pad = 9, .ee_info = 0x01020304, .ee_data = 0x05060708 };
	struct udmabuf_create create = { .memfd = 7, .flags = UDMABUF_FLAGS_CLOEXEC,
					 .offset = 0x100002000, .size = 0x4000000 };
	struct udmabuf_create_list head = { .flags = UDMABUF_FLAGS_CLOEXEC, .count = 2 };
	struct udmabuf_create_item items[] = { { .memfd = 7, .offset = 0x1000, .size = 0x200000 },
					       { .memfd = 8, .offset = 0x100002000, .size = 0x3000 } };
	struct dma_heap_allocation_data allocation = { .len = 0x140000000, .fd_flags = O_RDWR | O_CLOEXEC,
						       .heap_flags = 0 };
	struct dma_buf_sync sync = { .flags = DMA_BUF_SYNC_END | DMA_BUF_SYNC_RW };
	unsigned char list[sizeof(head) + sizeof(items)];

	memcpy(list, &head, sizeof(head));
	memcpy(list + sizeof(head), items, sizeof(items));

	print_bytes("cmsghdr", &header, sizeof(header));
	print_bytes("dmabuf_cmsg", &frag, sizeof(frag));
	print_bytes("dmabuf_token[2]", tokens, sizeof(tokens));
	print_bytes("sock_extended_err", &error, sizeof(error));
	print_bytes("sock_extended_err icmp", &icmp, sizeof(icmp));
	print_bytes("udmabuf_create", &create, sizeof(create));
	print_bytes("udmabuf_create_list", list, sizeof(list));
	print_bytes("dma_heap_allocation_data", &allocation, sizeof(allocation));
	allocation.fd = 42;
	print_bytes("dma_heap_allocation_data answered", &allocation, sizeof(allocation));
	print_bytes("dma_buf_sync", &sync, sizeof(sync));
}

/* An ancillary buffer under construction, walked with the C library's macros. */
struct control {
	_Alignas(struct cmsghdr) unsigned char bytes[1024];
	struct msghdr message;
	struct cmsghdr *next;
	size_t size;
};

static void start_control(struct control *control)
{
	memset(control, 0, sizeof(*control));
	control->message.msg_control = control->bytes;
	control->message.msg_controllen = sizeof(control->bytes);
	control->next = CMSG_FIRSTHDR(&control->message);
}

static void add_cmsg(struct control *control, int level, int type, const void *data, size_t size)
{
	control->next->cmsg_len = CMSG_LEN(size);
	control->next->cmsg_level = level;
	control->next->cmsg_type = type;
	memcpy(CMSG_DATA(control->next), data, size);
	control->next = CMSG_NXTHDR(&control->message, control->next);
	control->size += CMSG_SPACE(size);
}

static void add_dmabuf(struct control *control, __u64 offset, __u32 size, __u32 token, __u32 dmabuf_id)
{
	struct dmabuf_cmsg frag = { .frag_offset = offset, .frag_size = size, .frag_token = token,
				    .dmabuf_id = dmabuf_id };

	add_cmsg(control, SOL_SOCKET, SCM_DEVMEM_DMABUF, &frag, sizeof(frag));
}

static void add_linear(struct control *control, __u32 size)
{
	struct dmabuf_cmsg frag = { .frag_size = size };

	add_cmsg(control, SOL_SOCKET, SCM_DEVMEM_LINEAR, &frag, sizeof(frag));
}

static void add_foreign(struct control *control, __u32 number)
{
	add_cmsg(control, FOREIGN_LEVEL, FOREIGN_TYPE, &number, sizeof(number));
}

static void print_receive_control(const char *name, int foreign)
{
	struct control control;

	start_control(&control);
	add_linear(&control, 100);
	add_dmabuf(&control, 0x5000, 4096, 1, 3);
	add_dmabuf(&control, 0x123456789000, 3720, 2, 3);
	if (foreign)
		add_foreign(&control, 77);
	add_linear(&control, 1);
	add_dmabuf(&control, 0x1001, 1, 0xffffffff, 0x80000000);
	add_linear(&control, 23);
	if (foreign)
		add_foreign(&control, 78);
	print_bytes(name, control.bytes, control.size);
}

static void print_errqueue_control(void)
{
	struct { struct sock_extended_err error; struct sockaddr_in offender; } v4 = {
		.error = { .ee_origin = SO_EE_ORIGIN_ZEROCOPY } };
	struct { struct sock_extended_err error; struct sockaddr_in6 offender; } v6 = {
		.error = { .ee_origin = SO_EE_ORIGIN_ZEROCOPY } };
	struct sock_extended_err icmp = { .ee_errno = 111, .ee_origin = SO_EE_ORIGIN_ICMP, .ee_info = 1, .ee_data = 2 };
	struct control control;

	start_control(&control);
	v4.error.ee_info = 0;
	v4.error.ee_data = 9;
	add_cmsg(&control, SOL_IP, IP_RECVERR, &v4, sizeof(v4));
	v4.error.ee_info = 0xfffffffe;
	v4.error.ee_data = 1;
	add_cmsg(&control, SOL_IP, IP_RECVERR, &v4, sizeof(v4));
	print_bytes("errqueue control ipv4", control.bytes, control.size);

	start_control(&control);
	v6.error.ee_info = 10;
	v6.error.ee_data = 10;
	add_cmsg(&control, SOL_IPV6, IPV6_RECVERR, &v6, sizeof(v6));
	v6.error.ee_info = 11;
	v6.error.ee_data = 12;
	add_cmsg(&control, SOL_IPV6, IPV6_RECVERR, &v6, sizeof(v6));
	print_bytes("errqueue control ipv6", control.bytes, control.size);

	add_cmsg(&control, SOL_IP, IP_RECVERR, &icmp, sizeof(icmp));
	add_foreign(&control, 77);
	print_bytes("errqueue control mixed", control.bytes, control.size);
}

static void print_netlink_constants(void)
{
	PRINT_NUMBER(NETLINK_GENERIC);
	PRINT_NUMBER(SOL_NETLINK);
	PRINT_NUMBER(NETLINK_CAP_ACK);
	PRINT_NUMBER(NETLINK_EXT_ACK);
	PRINT_NUMBER(NLMSG_NOOP);
	PRINT_NUMBER(NLMSG_ERROR);
	PRINT_NUMBER(NLMSG_DONE);
	PRINT_NUMBER(NLMSG_MIN_TYPE);
	PRINT_NUMBER(NLM_F_REQUEST);
	PRINT_NUMBER(NLM_F_MULTI);
	PRINT_NUMBER(NLM_F_ACK);
	PRINT_NUMBER(NLM_F_DUMP_INTR);
	PRINT_NUMBER(NLM_F_DUMP);
	PRINT_NUMBER(NLM_F_CAPPED);
	PRINT_NUMBER(NLM_F_ACK_TLVS);
	PRINT_NUMBER(NLA_F_NESTED);
	PRINT_NUMBER(NLA_F_NET_BYTEORDER);
	PRINT_NUMBER((__u16)NLA_TYPE_MASK);
	PRINT_NUMBER(NLMSGERR_ATTR_MSG);
	PRINT_NUMBER(NLMSGERR_ATTR_OFFS);
	PRINT_NUMBER(NLMSGERR_ATTR_POLICY);
	PRINT_NUMBER(NLMSGERR_ATTR_MISS_TYPE);
	PRINT_NUMBER(NLMSGERR_ATTR_MISS_NEST);
	PRINT_NUMBER(NL_POLICY_TYPE_ATTR_MIN_VALUE_S);
	PRINT_NUMBER(NL_POLICY_TYPE_ATTR_MAX_VALUE_S);
	PRINT_NUMBER(NL_POLICY_TYPE_ATTR_MIN_VALUE_U);
	PRINT_NUMBER(NL_POLICY_TYPE_ATTR_MAX_VALUE_U);
	PRINT_NUMBER(NL_POLICY_TYPE_ATTR_MIN_LENGTH);
	PRINT_NUMBER(NL_POLICY_TYPE_ATTR_MAX_LENGTH);
	PRINT_NUMBER(GENL_ID_CTRL);
	PRINT_NUMBER(CTRL_CMD_GETFAMILY);
	PRINT_NUMBER(CTRL_ATTR_FAMILY_ID);
	PRINT_NUMBER(CTRL_ATTR_FAMILY_NAME);
	PRINT_NUMBER(CTRL_ATTR_VERSION);
	PRINT_SIZE(nlmsghdr);
	PRINT_SIZE(genlmsghdr);
	PRINT_SIZE(nlattr);
}

/* A request for a family by its name, of 5 letters, so that it is padded. */
static void print_netlink_request(void)
{
	struct {
		struct nlmsghdr header;
		struct genlmsghdr generic;
		struct nlattr attribute;
		char name[NLA_ALIGN(sizeof("netde"))];
	} request = {
		.header = { .nlmsg_len = sizeof(request), .nlmsg_type = GENL_ID_CTRL,
			    .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK, .nlmsg_seq = 0x01020304, .nlmsg_pid = 0x05060708 },
		.generic = { .cmd = CTRL_CMD_GETFAMILY, .version = 2 },
		.attribute = { .nla_len = NLA_HDRLEN + sizeof("netde"),
			       .nla_type = CTRL_ATTR_FAMILY_NAME | NLA_F_NESTED },
		.name = "netde",
	};

	print_bytes("netlink request", &request, sizeof(request));
}

int main(void)
{
	print_constants();
	print_layouts();
	print_examples();
	print_receive_control("receive control uniform", 0);
	print_receive_control("receive control mixed", 1);
	print_errqueue_control();
	print_netlink_constants();
	print_netlink_request();
	return 0;
}
