#![allow(clippy::unwrap_used)]

use kinoflock_protocol::Keypair;

use super::*;

fn node(number: u16) -> NodeId {
    let mut seed = [0; 32];
    seed[..2].copy_from_slice(&number.to_le_bytes());
    Keypair::from_seed(&seed).node_id()
}

/// Nodes that all hear of each other what their slices let them hear, looking every half minute.
struct Network {
    nodes: Vec<Depth>,
    now: Instant,
}

impl Network {
    fn new(count: u16, limit: usize) -> Self {
        Self {
            nodes: (0..count).map(|number| Depth::new(node(number), limit)).collect(),
            now: Instant::now(),
        }
    }

    /// The nodes whose adverts this one hears.
    fn heard(&self, by: &Depth) -> Vec<NodeId> {
        let heard = by.heard();
        let tells = self.nodes.iter().filter(|node| node.own != by.own && heard.contains(&node.told()));
        tells.map(|node| node.own).collect()
    }

    fn pass(&mut self, seconds: u64) {
        for _ in 0..seconds / 30 {
            self.now += Duration::from_secs(30);
            let all: Vec<u8> = self.nodes.iter().map(|node| node.told().depth()).collect();
            let heard: Vec<_> = self.nodes.iter().map(|node| self.heard(node)).collect();
            for (node, heard) in self.nodes.iter_mut().zip(&heard) {
                let known = |slice: &Slice| heard.iter().filter(|node| slice.holds(node)).count();
                node.poll(known, &all, self.now);
            }
        }
    }

    fn most_heard(&self) -> usize {
        self.nodes.iter().map(|node| self.heard(node).len()).max().unwrap()
    }
}

#[test]
fn what_a_node_hears_is_bounded_however_large_the_network_is() {
    for count in [100, 400, 800] {
        let mut network = Network::new(count, 32);
        network.pass(900);
        assert!(network.most_heard() <= 2 * 32 + 8, "{count} nodes: one hears {}", network.most_heard());
        let least = network.nodes.iter().map(|node| network.heard(node).len()).min().unwrap();
        assert!(least >= 8, "{count} nodes: one hears {least} only");
    }
}

#[test]
fn a_small_network_stays_whole() {
    let mut network = Network::new(30, 32);
    network.pass(600);
    assert!(
        network.nodes.iter().all(|node| node.told() == Slice::ALL && node.heard() == [Slice::ALL].into())
    );
}

#[test]
fn when_most_have_gone_the_others_come_together_again() {
    let mut network = Network::new(400, 32);
    network.pass(900);
    assert!(network.nodes.iter().all(|node| node.told() != Slice::ALL));
    network.nodes.truncate(10);
    network.pass(3600);
    for node in &network.nodes {
        assert_eq!(network.heard(node).len(), 9);
    }
}

#[test]
fn who_comes_anew_begins_where_its_neighbours_are_if_members_are_known_there() {
    let (own, now) = (node(1), Instant::now());
    let mut depth = Depth::new(own, 32);
    assert!(!depth.poll(|_| 0, &[4, 4, 3], now), "nobody is known there");
    assert!(!depth.poll(|_| 20, &[], now), "nobody is near");
    assert!(depth.poll(|slice| if slice.depth() == 4 { 5 } else { 20 }, &[4, 4, 3, 16, 16], now));
    assert_eq!(depth.told(), Slice::of(&own, 4));
}

#[test]
fn about_twenty_nodes_are_noted_for_a_model_and_none_in_a_small_network() {
    let model = ModelId::from_bytes([7; 32]);
    let deep = |number| Depth { depth: 4, ..Depth::new(node(number), 32) };
    let noted = (0..800).filter(|number| deep(*number).is_noted(&model, 49)).count();
    assert!((8..=36).contains(&noted), "{noted} of 800");
    assert!(deep(1).is_noted(&model, 0), "who serves it alone is always noted");
    assert!(!Depth::new(node(1), 32).is_noted(&model, 0));
}

#[test]
fn contacts_are_bounded_and_forgotten() {
    let (mut contacts, now) = (Contacts::default(), Instant::now());
    for number in 0..200_u8 {
        let model = ModelId::from_bytes([number; 32]);
        contacts.keep(model, vec![node(1)], now + Duration::from_secs(number.into()));
    }
    assert_eq!(contacts.known.len(), MAX_CONTACTS);
    let last = ModelId::from_bytes([199; 32]);
    assert_eq!(contacts.of(&last, now + Duration::from_secs(300)), [node(1)]);
    assert!(contacts.of(&last, now + REMEMBERED * 2).is_empty());
    contacts.keep(last, Vec::new(), now);
    assert!(contacts.of(&last, now).is_empty());
}
