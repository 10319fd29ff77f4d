//! When nobody takes a job: the reasons, each told once with the nodes that gave it, and what change would make it
//! possible. Pure: refusals in, words and records out.

use std::collections::BTreeMap;
use std::fmt;

use kinoflock_protocol::{NodeId, Reason, Refusal};
use serde::Serialize;

use super::{Declined, Why, called};

/// Nodes that are named in a group; the others are only counted.
const MAX_NAMED: usize = 8;
/// Models that are named as served; the others are only counted.
const MAX_MODELS: usize = 8;

/// Nodes that gave the same reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group<'a> {
    /// The reason.
    pub why: &'a Why,
    /// Each of them: its id, and the name that it gave itself.
    pub nodes: Vec<(NodeId, &'a str)>,
}

/// A change of the job, of its settings or of the hour, by which nodes that declined could take it.
///
/// A node tells the first of its rules that stands against a job, so what is promised here is that this rule is met.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "change", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Change {
    /// Ask for less of something: the least step down that helps anybody.
    Less {
        /// Of what, such as `frames`.
        what: String,
        /// At most so much.
        limit: u64,
        /// So much was asked for.
        given: u64,
        /// Nodes that it helps with.
        nodes: usize,
    },
    /// Shorten the prompt.
    ShorterPrompt {
        /// Nodes that it helps with.
        nodes: usize,
    },
    /// Leave out an operation that they do not know.
    WithoutOperation {
        /// Its name.
        operation: String,
        /// Nodes that it helps with.
        nodes: usize,
    },
    /// Do not insist on terms.
    WithoutTerms {
        /// Nodes that it helps with.
        nodes: usize,
    },
    /// Take another model.
    OtherModel {
        /// Names, each with the number of nodes that serve it; the most frequent first.
        models: Vec<(String, usize)>,
    },
    /// Get onto an operator's list.
    Listed {
        /// Nodes that serve listed keys only.
        nodes: usize,
    },
    /// Wait until some of one's own jobs are done and fetched.
    OwnShare {
        /// Nodes where this key's share is used up.
        nodes: usize,
    },
    /// Come back later.
    Later {
        /// Nodes that are paused or full now.
        nodes: usize,
    },
    /// Come back when they answer.
    Unreachable {
        /// Nodes that could not be asked.
        nodes: usize,
    },
}

/// A node's reason as a record for programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReasonRecord {
    node: NodeId,
    name: String,
    reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    given: Option<String>,
    text: String,
}

impl ReasonRecord {
    /// The record of one node's reason.
    #[must_use]
    pub fn of(declined: &Declined) -> Self {
        let Declined { node, name, why } = declined;
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let (reason, rule, limit, given) = match why {
            Why::OtherModels(_) => ("other_models", None, None, None),
            Why::Closed(_) => ("closed", None, None, None),
            Why::TooLarge { what, limit, given } => {
                ("too_large", some(what), Some(limit.to_string()), Some(given.to_string()))
            }
            Why::Terms(_) => ("terms", None, None, None),
            Why::Refused(r) => (r.code(), some(&r.rule), some(&r.limit), some(&r.given)),
            Why::Failed(_) => ("failed", None, None, None),
        };
        Self { node: *node, name: name.clone(), reason, rule, limit, given, text: why.to_string() }
    }
}

/// The reasons, each once, in the order in which they came; a node that gave the same one twice counts once.
#[must_use]
pub fn grouped(declined: &[Declined]) -> Vec<Group<'_>> {
    let mut groups: Vec<Group<'_>> = Vec::new();
    for Declined { node, name, why } in declined {
        let named = (*node, name.as_str());
        match groups.iter_mut().find(|group| group.why == why) {
            Some(group) if group.nodes.contains(&named) => {}
            Some(group) => group.nodes.push(named),
            None => groups.push(Group { why, nodes: vec![named] }),
        }
    }
    groups
}

/// What would make the job possible, the smallest change of the job first, then what costs time or trust.
#[must_use]
pub fn changes(declined: &[Declined]) -> Vec<Change> {
    let mut sum = Sum::default();
    // The last word of each node: one that was asked again may have said something else.
    let last: BTreeMap<NodeId, &Why> = declined.iter().map(|one| (one.node, &one.why)).collect();
    for why in last.into_values() {
        sum.count(why);
    }
    sum.changes()
}

impl fmt::Display for Group<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, (node, name)) in self.nodes.iter().take(MAX_NAMED).enumerate() {
            write!(f, "{}node {}", if place == 0 { "" } else { ", " }, called(name, node))?;
        }
        match self.nodes.len() {
            1 => write!(f, ": {}", self.why),
            count if count > MAX_NAMED => {
                write!(f, " and {} more ({count} nodes): {}", count - MAX_NAMED, self.why)
            }
            count => write!(f, " ({count} nodes): {}", self.why),
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Less { what, limit, given, nodes } => {
                write!(f, "with at most {limit} {what} instead of {given}, {} could take it", counted(*nodes))
            }
            Self::ShorterPrompt { nodes } => {
                write!(f, "with a shorter prompt, {} could take it", counted(*nodes))
            }
            Self::WithoutOperation { operation, nodes } => {
                write!(f, "without --set {operation}=..., {} could take it", counted(*nodes))
            }
            Self::WithoutTerms { nodes } => {
                write!(f, "without --require-terms, {} could take it", counted(*nodes))
            }
            Self::OtherModel { models } => {
                let named = models.iter().take(MAX_MODELS);
                let named: Vec<_> =
                    named.map(|(name, nodes)| format!("{name} ({})", counted(*nodes))).collect();
                let more = models.len().saturating_sub(MAX_MODELS);
                let more = if more > 0 { format!(" and {more} more") } else { String::new() };
                write!(f, "served here: {}{more}; name one with --model", named.join(", "))
            }
            Self::Listed { nodes } => {
                let serve =
                    if *nodes == 1 { "serves only keys that its" } else { "serve only keys that their" };
                let them = if *nodes == 1 { "it" } else { "them" };
                write!(
                    f,
                    "{} {serve} operator listed: show {them} yours, it is printed by: kinoflock key show",
                    counted(*nodes)
                )
            }
            Self::OwnShare { nodes } => {
                let nodes = counted(*nodes);
                write!(f, "your share of {nodes} is used up: fetch your finished clips, or try again later")
            }
            Self::Later { nodes } => {
                let are = if *nodes == 1 { "is" } else { "are" };
                write!(f, "{} {are} paused or full now: try again later", counted(*nodes))
            }
            Self::Unreachable { nodes } => {
                write!(f, "{} could not be asked: try again when the connection is back", counted(*nodes))
            }
        }
    }
}

/// `1 node`, `2 nodes`.
fn counted(nodes: usize) -> String {
    if nodes == 1 { "1 node".to_owned() } else { format!("{nodes} nodes") }
}

/// What was counted of the reasons.
#[derive(Default)]
struct Sum {
    /// By what there is too much of: the greatest limit, what was given, and how many nodes have that limit.
    less: BTreeMap<String, (u64, u64, usize)>,
    prompt: usize,
    operations: BTreeMap<String, usize>,
    terms: usize,
    models: BTreeMap<String, usize>,
    listed: usize,
    share: usize,
    later: usize,
    unreachable: usize,
}

impl Sum {
    fn count(&mut self, why: &Why) {
        match why {
            Why::OtherModels(models) => {
                for model in models {
                    *self.models.entry(model.clone()).or_default() += 1;
                }
            }
            Why::Closed(_) => self.later += 1,
            Why::TooLarge { what, limit, given } => self.count_less(what, *limit, *given),
            Why::Terms(_) => self.terms += 1,
            Why::Failed(_) => self.unreachable += 1,
            Why::Refused(refusal) => self.count_refusal(refusal),
        }
    }

    fn count_refusal(&mut self, refusal: &Refusal) {
        match refusal.reason {
            Reason::TooLarge | Reason::InputsTooLarge => {
                // What is no number cannot be compared: the refusal itself says what to do.
                if let (Some(limit), Some(given)) = (number(&refusal.limit), number(&refusal.given)) {
                    self.count_less(&measure(&refusal.rule), limit, given);
                }
            }
            Reason::PromptTooLong => self.prompt += 1,
            Reason::UnknownOperation if !refusal.rule.is_empty() => {
                *self.operations.entry(refusal.rule.to_string()).or_default() += 1;
            }
            Reason::NotAllowed => self.listed += 1,
            Reason::QuotaExceeded => self.share += 1,
            Reason::QueueFull
            | Reason::StoreFull
            | Reason::Busy
            | Reason::Paused
            | Reason::Draining
            | Reason::TooManyLeases
            | Reason::LeaseExpired
            | Reason::LeaseUnknown => self.later += 1,
            _ => {}
        }
    }

    fn count_less(&mut self, what: &str, limit: u64, given: u64) {
        let known = self.less.entry(what.to_owned()).or_insert((limit, given, 0));
        match limit.cmp(&known.0) {
            std::cmp::Ordering::Greater => *known = (limit, given, 1),
            std::cmp::Ordering::Equal => known.2 += 1,
            std::cmp::Ordering::Less => {}
        }
    }

    fn changes(self) -> Vec<Change> {
        let less = self.less.into_iter();
        let less = less.map(|(what, (limit, given, nodes))| Change::Less { what, limit, given, nodes });
        let operations = self.operations.into_iter();
        let operations = operations.map(|(operation, nodes)| Change::WithoutOperation { operation, nodes });
        let mut models: Vec<_> = self.models.into_iter().collect();
        models.sort_by_key(|(_, nodes)| std::cmp::Reverse(*nodes));
        let mut changes: Vec<Change> = less.collect();
        let mut add = |nodes: usize, change: fn(usize) -> Change| {
            if nodes > 0 {
                changes.push(change(nodes));
            }
        };
        add(self.prompt, |nodes| Change::ShorterPrompt { nodes });
        add(self.terms, |nodes| Change::WithoutTerms { nodes });
        add(self.later, |nodes| Change::Later { nodes });
        add(self.share, |nodes| Change::OwnShare { nodes });
        add(self.listed, |nodes| Change::Listed { nodes });
        add(self.unreachable, |nodes| Change::Unreachable { nodes });
        changes.extend(operations);
        if !models.is_empty() {
            changes.push(Change::OtherModel { models });
        }
        changes
    }
}

/// The number at the beginning of a limit such as `16 tokens`.
fn number(text: &str) -> Option<u64> {
    text.split_whitespace().next()?.parse().ok()
}

/// What a rule such as `max_frames` counts, in the words that an advert's limits are told with.
fn measure(rule: &str) -> String {
    match rule {
        "max_width" => "pixels of width".to_owned(),
        "max_height" => "pixels of height".to_owned(),
        "max_work" => "units of work".to_owned(),
        "inputs" | "max_input_bytes" => "bytes of inputs".to_owned(),
        other => other.strip_prefix("max_").unwrap_or(other).to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn declined(number: u8, why: Why) -> Declined {
        Declined { node: NodeId::from_bytes([number; 32]), name: format!("n{number}"), why }
    }

    fn frames(limit: u64) -> Why {
        Why::TooLarge { what: "frames", limit, given: 161 }
    }

    fn refused(reason: Reason, rule: &str) -> Why {
        Why::Refused(Refusal::new(reason, rule))
    }

    fn said(declined: &[Declined]) -> Vec<String> {
        changes(declined).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_reason_is_told_once_with_everybody_who_gave_it() {
        let closed = || Why::Closed("is paused by its operator");
        let all =
            [declined(1, closed()), declined(2, frames(97)), declined(3, closed()), declined(3, closed())];
        let groups = grouped(&all);
        assert_eq!(groups.iter().map(|group| group.nodes.len()).collect::<Vec<_>>(), [2, 1]);
        let text = groups[0].to_string();
        assert!(text.starts_with("node n1 (...") && text.contains(", node n3 (..."), "{text}");
        assert!(text.ends_with("(2 nodes): is paused by its operator"), "{text}");
        assert_eq!(groups[1].to_string(), all[1].to_string(), "one node reads as it always did");
    }

    #[test]
    fn of_very_many_nodes_some_are_named_and_all_are_counted() {
        let all: Vec<_> = (0..30).map(|n| declined(n, Why::Closed("has a full queue"))).collect();
        let text = grouped(&all)[0].to_string();
        assert!(text.contains(" and 22 more (30 nodes): has a full queue"), "{text}");
        assert_eq!(text.matches("node n").count(), MAX_NAMED);
    }

    #[test]
    fn the_least_step_down_that_helps_anybody_is_told_however_it_was_refused() {
        let rule = Why::Refused(Refusal::new(Reason::TooLarge, "max_frames").limit(97, 161));
        let all = [declined(1, frames(49)), declined(2, frames(97)), declined(3, rule)];
        assert_eq!(said(&all), ["with at most 97 frames instead of 161, 2 nodes could take it"]);
    }

    #[test]
    fn each_kind_of_reason_has_its_change() {
        let models = |names: &[&str]| Why::OtherModels(names.iter().map(ToString::to_string).collect());
        let all = [
            declined(1, models(&["ltx", "motif"])),
            declined(2, models(&["motif"])),
            declined(3, Why::Closed("has a full queue")),
            declined(4, refused(Reason::Paused, "pause")),
            declined(5, Why::Terms("it claims rights in what it makes".to_owned())),
            declined(6, refused(Reason::NotAllowed, "policy.allow")),
            declined(7, refused(Reason::UnknownOperation, "foo")),
            declined(8, Why::Failed("connection lost".to_owned())),
            declined(9, refused(Reason::QuotaExceeded, "policy.queued_jobs")),
            declined(10, refused(Reason::PromptTooLong, "max_prompt_tokens")),
            declined(11, refused(Reason::Denied, "policy.deny")),
        ];
        let expected = [
            "with a shorter prompt, 1 node could take it",
            "without --require-terms, 1 node could take it",
            "2 nodes are paused or full now: try again later",
            "your share of 1 node is used up: fetch your finished clips, or try again later",
            "1 node serves only keys that its operator listed: show it yours, it is printed by: kinoflock key show",
            "1 node could not be asked: try again when the connection is back",
            "without --set foo=..., 1 node could take it",
            "served here: motif (2 nodes), ltx (1 node); name one with --model",
        ];
        assert_eq!(said(&all), expected);
    }

    #[test]
    fn a_node_that_was_asked_again_counts_by_its_last_word() {
        let all = [declined(1, refused(Reason::TooManyLeases, "")), declined(1, frames(97))];
        assert_eq!(said(&all), ["with at most 97 frames instead of 161, 1 node could take it"]);
        assert_eq!(said(&[declined(1, refused(Reason::Denied, ""))]), Vec::<String>::new());
    }

    #[test]
    fn records_carry_the_rule_and_its_numbers() {
        let record = serde_json::to_value(ReasonRecord::of(&declined(1, frames(97)))).unwrap_or_default();
        assert_eq!(record["reason"], "too_large");
        assert_eq!((record["rule"].as_str(), record["limit"].as_str()), (Some("frames"), Some("97")));
        let change = Change::Less { what: "frames".to_owned(), limit: 97, given: 161, nodes: 2 };
        let change = serde_json::to_value(change).unwrap_or_default();
        assert_eq!((change["change"].as_str(), change["nodes"].as_u64()), (Some("less"), Some(2)));
    }
}
