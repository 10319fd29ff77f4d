//! Nodes and addresses in few bytes, for tickets.
//!
//! A number is seven bits a byte, least first, the eighth says that more follow. An address is its parts, each a byte that
//! says which and its value, then [`END`]; one that has other parts, or another spelling than its parts would get again,
//! is [`TEXT`] and the text as it is. Nothing here panics or reserves by a length that was only told.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::NodeAddress;
use crate::codec::{List, Text};
use crate::id::NodeId;
use crate::limits::{MAX_ADDRESS, MAX_NODES};

/// The address is complete.
const END: u8 = 0;
const IP4: u8 = 1;
const IP6: u8 = 2;
const TCP: u8 = 7;
/// `/udp/PORT/quic-v1`.
const QUIC: u8 = 8;
const P2P: u8 = 9;
const CIRCUIT: u8 = 10;
/// The whole address as text.
const TEXT: u8 = 255;
/// Parts that are names, with how they are written.
const NAMES: [(u8, &str); 4] = [(3, "dns"), (4, "dns4"), (5, "dns6"), (6, "dnsaddr")];

/// Bytes that grow.
#[derive(Debug, Default)]
pub(super) struct Writer(Vec<u8>);

impl Writer {
    pub(super) fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(super) fn number(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.0.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.0.push(number as u8);
    }

    pub(super) fn nodes(&mut self, nodes: &[NodeAddress]) {
        self.number(nodes.len() as u64);
        for node in nodes {
            self.bytes(node.id.as_bytes());
            self.number(node.addresses.len() as u64);
            node.addresses.iter().for_each(|addr| self.address(addr.as_str()));
        }
    }

    pub(super) fn finish(self) -> Vec<u8> {
        self.0
    }

    fn address(&mut self, text: &str) {
        let packed = pack(text).filter(|packed| Reader(packed).address().as_deref() == Some(text));
        match packed {
            Some(packed) => self.bytes(&packed),
            None => {
                self.byte(TEXT);
                self.text(text);
            }
        }
    }

    fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.bytes(text.as_bytes());
    }
}

/// Bytes that are read from their beginning; `None` wherever they are no such thing.
#[derive(Debug)]
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn of(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*array)
    }

    pub(super) fn number(&mut self) -> Option<u64> {
        let mut number = 0u64;
        for place in 0..u64::BITS.div_ceil(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f).checked_shl(place * 7)?;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }

    pub(super) fn nodes(&mut self) -> Option<List<NodeAddress, MAX_NODES>> {
        let count = self.count(MAX_NODES)?;
        let nodes = (0..count).map(|_| self.node()).collect::<Option<Vec<_>>>()?;
        List::new(nodes).ok()
    }

    fn node(&mut self) -> Option<NodeAddress> {
        let id = NodeId::from_bytes(self.array()?);
        let count = self.count(crate::limits::MAX_ADDRESSES)?;
        let address = |body: &mut Self| Text::<MAX_ADDRESS>::new(body.address()?).ok();
        let addresses = (0..count).map(|_| address(self)).collect::<Option<Vec<_>>>()?;
        Some(NodeAddress { id, addresses: List::new(addresses).ok()? })
    }

    fn count(&mut self, most: usize) -> Option<usize> {
        usize::try_from(self.number()?).ok().filter(|count| *count <= most)
    }

    fn text(&mut self) -> Option<&'a str> {
        let len = self.count(MAX_ADDRESS)?;
        let (text, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        std::str::from_utf8(text).ok()
    }

    fn address(&mut self) -> Option<String> {
        let mut text = String::new();
        loop {
            let part = match self.byte()? {
                END => return Some(text),
                TEXT if text.is_empty() => return self.text().map(str::to_owned),
                IP4 => format!("/ip4/{}", Ipv4Addr::from(self.array::<4>()?)),
                IP6 => format!("/ip6/{}", Ipv6Addr::from(self.array::<16>()?)),
                TCP => format!("/tcp/{}", u16::from_be_bytes(self.array()?)),
                QUIC => format!("/udp/{}/quic-v1", u16::from_be_bytes(self.array()?)),
                P2P => format!("/p2p/{}", NodeId::from_bytes(self.array()?)),
                CIRCUIT => "/p2p-circuit".to_owned(),
                name => {
                    let (_, kind) = NAMES.iter().find(|(code, _)| *code == name)?;
                    format!("/{kind}/{}", self.text()?)
                }
            };
            text.push_str(&part);
            if text.len() > MAX_ADDRESS {
                return None;
            }
        }
    }
}

/// The parts of an address; `None` if it has others than these.
fn pack(text: &str) -> Option<Vec<u8>> {
    let mut parts = text.strip_prefix('/')?.split('/');
    let mut out = Writer::default();
    while let Some(part) = parts.next() {
        match part {
            "ip4" => {
                out.byte(IP4);
                out.bytes(&parts.next()?.parse::<Ipv4Addr>().ok()?.octets());
            }
            "ip6" => {
                out.byte(IP6);
                out.bytes(&parts.next()?.parse::<Ipv6Addr>().ok()?.octets());
            }
            "tcp" => {
                out.byte(TCP);
                out.bytes(&parts.next()?.parse::<u16>().ok()?.to_be_bytes());
            }
            "udp" => {
                out.byte(QUIC);
                out.bytes(&parts.next()?.parse::<u16>().ok()?.to_be_bytes());
                parts.next().filter(|next| *next == "quic-v1")?;
            }
            "p2p" => {
                out.byte(P2P);
                out.bytes(parts.next()?.parse::<NodeId>().ok()?.as_bytes());
            }
            "p2p-circuit" => out.byte(CIRCUIT),
            name => {
                let (code, _) = NAMES.iter().find(|(_, kind)| *kind == name)?;
                out.byte(*code);
                out.text(parts.next()?);
            }
        }
    }
    out.byte(END);
    Some(out.finish())
}
