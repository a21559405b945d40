/*
 * Prints the ethtool ABI as this machine's C compiler and headers have it, one name=value a line: numbers in decimal,
 * bytes in hex. ethtool_abi.golden holds what it prints; test_ethtool_abi.py compares both with the Python package.
 *
 * Names are the kernel's.
 */

#include <arpa/inet.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <linux/types.h>
#include <linux/ethtool.h>
#include <linux/ethtool_netlink.h>
#include <linux/if.h>
#include <linux/sockios.h>

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
	PRINT_NUMBER(SIOCETHTOOL);
	PRINT_NUMBER(SIOCGIFHWADDR);
	PRINT_NUMBER(IFNAMSIZ);
	PRINT_NUMBER(ETHTOOL_GDRVINFO);
	PRINT_NUMBER(ETHTOOL_GPERMADDR);
	PRINT_NUMBER(ETHTOOL_GRXRINGS);
	PRINT_NUMBER(ETHTOOL_GRXCLSRLCNT);
	PRINT_NUMBER(ETHTOOL_GRXCLSRULE);
	PRINT_NUMBER(ETHTOOL_GRXCLSRLALL);
	PRINT_NUMBER(ETHTOOL_SRXCLSRLDEL);
	PRINT_NUMBER(ETHTOOL_SRXCLSRLINS);
	PRINT_NUMBER(ETHTOOL_GRSSH);
	PRINT_NUMBER(ETHTOOL_SRSSH);
	PRINT_NUMBER(TCP_V4_FLOW);
	PRINT_NUMBER(TCP_V6_FLOW);
	PRINT_NUMBER(FLOW_EXT);
	PRINT_NUMBER(FLOW_MAC_EXT);
	PRINT_NUMBER(FLOW_RSS);
	PRINT_NUMBER(RX_CLS_LOC_SPECIAL);
	PRINT_NUMBER(RX_CLS_LOC_ANY);
	PRINT_NUMBER(ETH_RXFH_INDIR_NO_CHANGE);

	PRINT_NUMBER(ETHTOOL_MSG_FEATURES_GET);
	PRINT_NUMBER(ETHTOOL_MSG_FEATURES_SET);
	PRINT_NUMBER(ETHTOOL_MSG_RINGS_GET);
	PRINT_NUMBER(ETHTOOL_MSG_RINGS_SET);
	PRINT_NUMBER(ETHTOOL_MSG_CHANNELS_GET);
	PRINT_NUMBER(ETHTOOL_MSG_CHANNELS_SET);
	PRINT_NUMBER(ETHTOOL_A_HEADER_DEV_INDEX);
	PRINT_NUMBER(ETHTOOL_A_HEADER_DEV_NAME);
	PRINT_NUMBER(ETHTOOL_A_HEADER_FLAGS);
	PRINT_NUMBER(ETHTOOL_A_RINGS_HEADER);
	PRINT_NUMBER(ETHTOOL_A_RINGS_RX_MAX);
	PRINT_NUMBER(ETHTOOL_A_RINGS_TX_MAX);
	PRINT_NUMBER(ETHTOOL_A_RINGS_RX);
	PRINT_NUMBER(ETHTOOL_A_RINGS_TX);
	PRINT_NUMBER(ETHTOOL_A_RINGS_TCP_DATA_SPLIT);
	PRINT_NUMBER(ETHTOOL_A_CHANNELS_HEADER);
	PRINT_NUMBER(ETHTOOL_A_CHANNELS_RX_MAX);
	PRINT_NUMBER(ETHTOOL_A_CHANNELS_TX_MAX);
	PRINT_NUMBER(ETHTOOL_A_CHANNELS_COMBINED_MAX);
	PRINT_NUMBER(ETHTOOL_A_CHANNELS_RX_COUNT);
	PRINT_NUMBER(ETHTOOL_A_CHANNELS_TX_COUNT);
	PRINT_NUMBER(ETHTOOL_A_CHANNELS_COMBINED_COUNT);
	PRINT_NUMBER(ETHTOOL_A_FEATURES_HEADER);
	PRINT_NUMBER(ETHTOOL_A_FEATURES_HW);
	PRINT_NUMBER(ETHTOOL_A_FEATURES_WANTED);
	PRINT_NUMBER(ETHTOOL_A_FEATURES_ACTIVE);
	PRINT_NUMBER(ETHTOOL_A_FEATURES_NOCHANGE);
	PRINT_NUMBER(ETHTOOL_A_BITSET_NOMASK);
	PRINT_NUMBER(ETHTOOL_A_BITSET_SIZE);
	PRINT_NUMBER(ETHTOOL_A_BITSET_BITS);
	PRINT_NUMBER(ETHTOOL_A_BITSET_BITS_BIT);
	PRINT_NUMBER(ETHTOOL_A_BITSET_BIT_INDEX);
	PRINT_NUMBER(ETHTOOL_A_BITSET_BIT_NAME);
	PRINT_NUMBER(ETHTOOL_A_BITSET_BIT_VALUE);
	PRINT_NUMBER(ETHTOOL_TCP_DATA_SPLIT_UNKNOWN);
	PRINT_NUMBER(ETHTOOL_TCP_DATA_SPLIT_DISABLED);
	PRINT_NUMBER(ETHTOOL_TCP_DATA_SPLIT_ENABLED);
}

static void print_layouts(void)
{
	PRINT_SIZE(ifreq);
	PRINT_SIZE(ethtool_drvinfo);
	PRINT_SIZE(ethtool_perm_addr);
	PRINT_SIZE(ethtool_rxfh);
	PRINT_SIZE(ethtool_tcpip4_spec);
	PRINT_SIZE(ethtool_tcpip6_spec);
	PRINT_SIZE(ethtool_rx_flow_spec);
	PRINT_SIZE(ethtool_rxnfc);
	PRINT_OFFSET(ethtool_rxnfc, fs);
	PRINT_OFFSET(ethtool_rxnfc, rule_cnt);
	PRINT_OFFSET(ethtool_rxnfc, rule_locs);
}

/* Every field has a value of its own, so that swapped fields show. */
static void print_examples(void)
{
	struct ethtool_rx_flow_spec v4 = { .flow_type = TCP_V4_FLOW, .ring_cookie = 15, .location = 1023 };
	struct ethtool_rx_flow_spec v6 = { .flow_type = TCP_V6_FLOW, .ring_cookie = 3, .location = RX_CLS_LOC_ANY };
	struct ethtool_rx_flow_spec odd = { .flow_type = UDP_V4_FLOW | FLOW_EXT, .ring_cookie = RX_CLS_FLOW_DISC,
					    .location = 7 };
	struct ethtool_rxnfc insert = { .cmd = ETHTOOL_SRXCLSRLINS };
	struct { struct ethtool_rxnfc head; __u32 more[2]; } all = { .head = { .cmd = ETHTOOL_GRXCLSRLALL,
									       .data = 1024, .rule_cnt = 3 } };
	struct { struct ethtool_rxfh head; __u32 table[4]; __u8 key[8]; } rss = {
		.head = { .cmd = ETHTOOL_SRSSH, .rss_context = 5, .indir_size = 4, .key_size = 8 },
		.table = { 0, 1, 2, 0x01020304 }, .key = { 1, 2, 3, 4, 5, 6, 7, 8 } };
	struct ethtool_drvinfo driver = { .cmd = ETHTOOL_GDRVINFO, .driver = "gve", .version = "7.3",
					  .fw_version = "fw", .bus_info = "0000:00:03.0", .n_stats = 9 };
	struct ifreq request;
	__u32 locations[3] = { 1021, 1022, 1023 };

	inet_pton(AF_INET, "10.1.2.3", &v4.h_u.tcp_ip4_spec.ip4src);
	inet_pton(AF_INET, "10.0.0.0", &v4.h_u.tcp_ip4_spec.ip4dst);
	inet_pton(AF_INET, "255.255.255.255", &v4.m_u.tcp_ip4_spec.ip4src);
	inet_pton(AF_INET, "255.0.0.0", &v4.m_u.tcp_ip4_spec.ip4dst);
	v4.h_u.tcp_ip4_spec.psrc = htons(0x1200);
	v4.m_u.tcp_ip4_spec.psrc = htons(0xff00);
	v4.h_u.tcp_ip4_spec.pdst = htons(5201);
	v4.m_u.tcp_ip4_spec.pdst = htons(0xffff);

	inet_pton(AF_INET6, "fd77::1", &v6.h_u.tcp_ip6_spec.ip6src);
	inet_pton(AF_INET6, "fd77::2", &v6.h_u.tcp_ip6_spec.ip6dst);
	memset(&v6.m_u.tcp_ip6_spec.ip6src, 0xff, 16);
	memset(&v6.m_u.tcp_ip6_spec.ip6dst, 0xff, 16);
	v6.h_u.tcp_ip6_spec.psrc = htons(40000);
	v6.m_u.tcp_ip6_spec.psrc = htons(0xffff);
	v6.h_u.tcp_ip6_spec.pdst = htons(443);
	v6.m_u.tcp_ip6_spec.pdst = htons(0xffff);

	insert.fs = v4;
	memcpy(all.head.rule_locs, locations, sizeof(locations));
	memset(&request, 0, sizeof(request));
	strcpy(request.ifr_name, "eth1");
	request.ifr_data = (void *)0x0102030405060708;

	print_bytes("ethtool_rx_flow_spec tcp4", &v4, sizeof(v4));
	print_bytes("ethtool_rx_flow_spec tcp6", &v6, sizeof(v6));
	print_bytes("ethtool_rx_flow_spec odd", &odd, sizeof(odd));
	print_bytes("ethtool_rxnfc insert", &insert, sizeof(insert));
	print_bytes("ethtool_rxnfc all", &all, offsetof(struct ethtool_rxnfc, rule_locs) + sizeof(locations));
	print_bytes("ethtool_rxfh", &rss, sizeof(rss));
	print_bytes("ethtool_drvinfo", &driver, sizeof(driver));
	print_bytes("ifreq", &request, sizeof(request));
}

int main(void)
{
	print_constants();
	print_layouts();
	print_examples();
	return 0;
}
