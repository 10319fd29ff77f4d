//! Protocol names as libp2p wants them, in the version that is spoken, and versions read from others' names.

use kinoflock_protocol::NetworkId;
use kinoflock_protocol::limits::PROTOCOL_VERSION;
use kinoflock_protocol::names::Protocols;
use libp2p::StreamProtocol;
use libp2p::gossipsub::IdentTopic;

use crate::slices::Slice;

/// What the name of our control protocol begins with, on any network.
const FAMILY: &str = "/kinoflock/";

/// The protocol names of one network in one version.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    pub(crate) version: u8,
    pub(crate) control: StreamProtocol,
    pub(crate) progress: StreamProtocol,
    pub(crate) blobs: StreamProtocol,
    pub(crate) kad: StreamProtocol,
    pub(crate) identify: String,
    topic: String,
    /// The control protocol's name up to its version.
    control_stem: String,
}

impl Names {
    pub(crate) fn new(network: &NetworkId, version: u8) -> Self {
        let names = Protocols::of(network);
        let stem = |name: &str| {
            let suffix = PROTOCOL_VERSION.to_string();
            name.strip_suffix(&suffix).expect("invariant: names end in the version").to_owned()
        };
        let protocol = |name: &str| {
            let name = format!("{}{version}", stem(name));
            StreamProtocol::try_from_owned(name).expect("invariant: names begin with a slash")
        };
        Self {
            version,
            control: protocol(&names.control),
            progress: protocol(&names.progress),
            blobs: protocol(&names.blobs),
            kad: protocol(&names.kad),
            identify: format!("{}{version}", stem(&names.identify)),
            topic: format!("{}{version}", stem(&names.capacity_topic)),
            control_stem: stem(&names.control),
        }
    }

    /// The topic of a slice's adverts.
    pub(crate) fn topic_of(&self, slice: &Slice) -> IdentTopic {
        IdentTopic::new(format!("{}{}", self.topic, slice.suffix()))
    }

    /// The slice whose adverts have this topic.
    pub(crate) fn slice_of(&self, topic: &str) -> Option<Slice> {
        topic.strip_prefix(&self.topic).and_then(Slice::of_suffix)
    }

    /// The versions of our control protocol among a peer's protocols, and whether it speaks the protocol on
    /// other networks only.
    pub(crate) fn versions(&self, protocols: &[StreamProtocol]) -> (Vec<u8>, bool) {
        let mut versions: Vec<u8> = protocols
            .iter()
            .filter_map(|name| name.as_ref().strip_prefix(&self.control_stem)?.parse().ok())
            .collect();
        versions.sort_unstable();
        versions.dedup();
        let elsewhere = |name: &StreamProtocol| {
            name.as_ref().strip_prefix(FAMILY).is_some_and(|rest| rest.contains("/control/"))
        };
        let other_network = versions.is_empty() && protocols.iter().any(elsewhere);
        (versions, other_network)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_networks_are_told_apart() {
        let (ours, others) = (NetworkId::named("ours"), NetworkId::named("others"));
        let names = Names::new(&ours, 1);
        assert_eq!(names.control.as_ref(), Protocols::of(&ours).control);
        let second = Names::new(&ours, 2);
        assert_eq!(names.versions(&[second.control.clone(), names.control.clone()]), (vec![1, 2], false));
        assert_eq!(names.versions(&[second.control, second.kad]), (vec![2], false));
        assert_eq!(names.versions(&[Names::new(&others, 1).control]), (vec![], true));
        assert_eq!(names.versions(&[StreamProtocol::new("/ipfs/ping/1.0.0")]), (vec![], false));
    }
}
