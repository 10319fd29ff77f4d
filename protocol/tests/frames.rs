//! Frames, versions, names, tickets and ids: what arrives in pieces, from another release, or mistyped.
#![allow(clippy::unwrap_used, missing_docs, dead_code)]

#[path = "support/samples.rs"]
mod samples;

use kinoflock_protocol::frame::{FrameError, FrameReader, frame};
use kinoflock_protocol::list::{ListKind, ListName};
use kinoflock_protocol::names::{ClipTicket, NodeAddress, NodeTicket, PUBLIC_NETWORK, Protocols};
use kinoflock_protocol::rpc::*;
use kinoflock_protocol::*;
use proptest::prelude::*;
use samples::Draw;

proptest! {
    #[test]
    fn frames_come_out_as_they_went_in_however_they_are_cut(
        frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..8),
        cuts in prop::collection::vec(1..50usize, 1..20),
    ) {
        let mut wire = Vec::new();
        for content in &frames {
            wire.extend(frame(content, 300).unwrap());
        }
        let mut reader = FrameReader::new(300);
        let mut out = Vec::new();
        let mut rest = &wire[..];
        for cut in cuts.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (head, tail) = rest.split_at((*cut).min(rest.len()));
            reader.push(head);
            rest = tail;
            while let Some(content) = reader.next_frame().unwrap() {
                out.push(content);
            }
        }
        prop_assert_eq!(out, frames);
        prop_assert_eq!(reader.finish(), Ok(()));
        prop_assert_eq!(reader.pending(), 0);
    }

    #[test]
    fn questions_and_answers_survive_the_wire(seed in any::<u64>()) {
        for request in samples::requests(&mut Draw(seed)) {
            prop_assert_eq!(decode_request(&encode_request(&request)).unwrap(), request);
        }
        for response in samples::responses(&mut Draw(seed)) {
            prop_assert_eq!(decode_response(&encode_response(&response)).unwrap(), response);
        }
    }

    #[test]
    fn every_other_version_is_told_so_whatever_follows(version in 2u8.., rest in prop::collection::vec(any::<u8>(), 0..40)) {
        let frame: Vec<u8> = [version].into_iter().chain(rest).collect();
        let error = decode_request(&frame).unwrap_err();
        prop_assert_eq!(&error, &RpcError::UnsupportedVersion { speaks: 1, sent: version });
        prop_assert_eq!(error.to_string(), format!("speaks protocol version 1, you sent {version}"));
    }

    #[test]
    fn tickets_survive_their_text_and_a_damaged_one_is_refused(seed in any::<u64>(), at in any::<prop::sample::Index>()) {
        let ticket = samples::node_ticket(&mut Draw(seed));
        let text = ticket.to_string();
        prop_assert_eq!(text.parse::<NodeTicket>().unwrap(), ticket);
        prop_assert_eq!(format!("  {text}\n").parse::<NodeTicket>().unwrap().to_string(), text.clone());
        let mut other = text.clone().into_bytes();
        let at = at.index(other.len());
        other[at] = if other[at] == b'a' { b'b' } else { b'a' };
        prop_assert!(String::from_utf8(other).unwrap().parse::<NodeTicket>().is_err());
        prop_assert!(text[..text.len() - 3].parse::<NodeTicket>().is_err());
        prop_assert!(text.parse::<ClipTicket>().is_err());
        let clip = samples::clip_ticket(&mut Draw(seed));
        prop_assert_eq!(clip.to_string().parse::<ClipTicket>().unwrap(), clip);
    }

    #[test]
    fn a_ticket_has_one_form_and_whatever_is_no_ticket_is_refused(
        seed in any::<u64>(), at in any::<prop::sample::Index>(), byte in any::<u8>()
    ) {
        let mut bytes = samples::node_ticket(&mut Draw(seed)).encode();
        prop_assert!(NodeTicket::decode(&bytes[..at.index(bytes.len())]).is_err());
        bytes.push(0);
        prop_assert!(NodeTicket::decode(&bytes).is_err());
        bytes.pop();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(ticket) = NodeTicket::decode(&bytes) {
            prop_assert_eq!(ticket.encode(), bytes);
        }
    }

    #[test]
    fn ids_survive_their_text_and_a_mistyped_one_is_refused(bytes in any::<[u8; 32]>(), at in 4..60usize) {
        let clip = ClipId::from_bytes(bytes);
        let text = clip.to_string();
        prop_assert_eq!(text.parse::<ClipId>().unwrap(), clip);
        prop_assert!(text.parse::<BlobId>().is_err());
        let mut other = text.into_bytes();
        other[at] = if other[at] == b'a' { b'b' } else { b'a' };
        prop_assert!(String::from_utf8(other).unwrap().parse::<ClipId>().is_err());
        let node = NodeId::from_bytes(bytes);
        prop_assert_eq!(node.to_string().parse::<NodeId>().unwrap(), node);
        let key = RequesterId::from_bytes(bytes);
        prop_assert_eq!(key.to_string().parse::<RequesterId>().unwrap(), key);
        prop_assert!(key.to_string().starts_with("kf1"));
        let publisher = PublicKey::from_bytes(bytes);
        for kind in [ListKind::Nodes, ListKind::Models] {
            let list = ListName { publisher, kind };
            prop_assert_eq!(list.to_string().parse::<ListName>().unwrap(), list);
            prop_assert!(list.to_string().starts_with("kflist1"));
        }
        let nonce = Nonce::from_bytes(bytes[..16].try_into().unwrap());
        prop_assert_eq!(nonce.to_string().parse::<Nonce>().unwrap(), nonce);
        let lease = LeaseId::from_bytes(bytes[..16].try_into().unwrap());
        prop_assert_eq!(lease.to_string().parse::<LeaseId>().unwrap(), lease);
    }

    #[test]
    fn no_bytes_are_read_as_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = decode_request(&bytes);
        let _ = decode_response(&bytes);
        let _ = Envelope::decode(&bytes);
        let text = String::from_utf8_lossy(&bytes);
        let _ = (text.parse::<NodeId>(), text.parse::<ClipId>(), text.parse::<NodeTicket>(), text.parse::<Micro>());
    }
}

#[test]
fn a_ticket_for_one_public_node_is_a_line_that_can_be_pasted() {
    let addresses = ["/ip4/198.18.0.1/udp/4820/quic-v1", "/ip4/198.18.0.1/tcp/4820"];
    let addresses = List::first_of(addresses.map(|addr| Text::new(addr).unwrap()));
    let node = NodeAddress { id: Keypair::from_seed(&[0; 32]).node_id(), addresses };
    let network = NetworkId::named(PUBLIC_NETWORK);
    let ticket = NodeTicket { network, nodes: List::first_of([node]), collective: None };
    let text = ticket.to_string();
    assert_eq!(text.len(), 99, "{text}");
    assert!(text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit()), "{text}");
}

#[test]
fn a_node_is_named_by_its_libp2p_peer_id() {
    // The PeerId of the key of seed 00..00 as libp2p-identity prints it.
    let node = Keypair::from_seed(&[0; 32]).node_id();
    assert_eq!(node.to_string(), "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN");
    assert_eq!(NodeId::from_peer_id_bytes(&node.to_peer_id_bytes()), Some(node));
    assert_eq!(NodeId::from_peer_id_bytes(b"short"), None);
}

#[test]
fn the_answer_to_an_unknown_version_is_read_by_all() {
    let answer = Response::UnsupportedVersion { speaks: 1, sent: 7 };
    assert_eq!(encode_response(&answer), [0, 1, 7]);
    assert_eq!(decode_response(&[0, 9, 1]).unwrap(), Response::UnsupportedVersion { speaks: 9, sent: 1 });
    let error = decode_stream::<BlobReply>(&unsupported_version(7)).unwrap_err();
    assert_eq!(error, RpcError::UnsupportedVersion { speaks: 1, sent: 7 });
    assert_eq!(decode_request(&[]).unwrap_err(), RpcError::Empty);
}

#[test]
fn a_frame_over_the_limit_or_cut_off_is_an_error_that_says_so() {
    assert_eq!(frame(&[0; 11], 10), Err(FrameError::TooLarge { limit: 10, given: 11 }));
    let mut reader = FrameReader::new(10);
    reader.push(&[11, 0, 0, 0]);
    let error = reader.next_frame().unwrap_err();
    assert_eq!(error.to_string(), "frame of 11 bytes exceeds the limit of 10 bytes");
    let mut reader = FrameReader::new(10);
    reader.push(&[5, 0, 0, 0, 1, 2]);
    assert_eq!(reader.next_frame(), Ok(None));
    assert_eq!(reader.finish(), Err(FrameError::Cut { missing: 3 }));
}

#[test]
fn protocol_names_carry_the_network_and_the_version() {
    let names = Protocols::of(&NetworkId::named(PUBLIC_NETWORK));
    let other = Protocols::of(&NetworkId::named("lab"));
    assert!(
        names.control.starts_with("/kinoflock/") && names.control.ends_with("/control/1"),
        "{}",
        names.control
    );
    assert_ne!(names.kad, other.kad);
}

#[test]
fn a_refusal_is_one_clear_sentence() {
    let refusal = Refusal::new(Reason::TooLarge, "max_frames").limit(97, 161).advice("ask for fewer frames");
    assert_eq!(
        refusal.to_string(),
        "larger than this node takes (rule max_frames): 161 is beyond the limit of 97; ask for fewer frames"
    );
    for reason in Reason::ALL {
        let text = Refusal::new(*reason, "").to_string();
        assert!(!text.is_empty() && !text.contains("  "), "{text}");
    }
}

#[test]
fn keys_and_prompts_are_not_shown_by_accident() {
    let prompt = Prompt::new("a secret garden").unwrap();
    assert_eq!(format!("{prompt:?}"), "<prompt of 15 bytes>");
    let seed = [7; 32];
    assert!(!format!("{:?}", Keypair::from_seed(&seed)).contains(&"07".repeat(32)));
}
