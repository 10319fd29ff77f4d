//! Two homes, each behind a router, and one public node between them, as network namespaces of this machine.
//!
//! ```text
//! artist 192.168.1.2 -- router 198.18.1.2 --- 198.18.0.1 public --- 198.18.2.2 router -- 192.168.2.2 maker
//! ```
//! The routers translate addresses by nftables and let nobody in whom they were not asked to. Where the system lets
//! nobody make namespaces, the tests say so and pass.
#![allow(clippy::unwrap_used)]

use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use kinoflock_tests::invariants;
use kinoflock_tests::sandbox::{Client, Node, Sandbox, Worker, eventually, said};

const PROMPT: &str = "a lantern behind two walls";
const PUBLIC: [&str; 2] = ["/ip4/198.18.0.1/udp/4820/quic-v1", "/ip4/198.18.0.1/tcp/4820"];
const HOME: [&str; 2] = ["/ip4/192.168.2.2/udp/4820/quic-v1", "/ip4/192.168.2.2/tcp/4820"];
/// More than a relay carries of a blob.
const LARGE_INPUT: usize = 2 << 20;
/// More than the public node holds for one, of what it holds for all.
const TOO_LARGE_INPUT: usize = 5 << 20;
const HELD_FOR_ALL: &str = "[storage]\nreplicas_limit = \"8 MiB\"\n";
/// Longest time for a client's command, seconds.
const COMMAND_S: &str = "1200";

/// How a router chooses the port under which a connection goes out.
#[derive(Debug, Clone, Copy)]
enum Ports {
    /// The inner one where it is free, as home routers do.
    Kept,
    /// A new one for every connection, as some do: holes cannot be punched.
    Random,
}

/// The namespaces; they go when it is dropped.
struct Homes {
    prefix: String,
}

impl Homes {
    /// All of it; or why this machine has no such thing.
    fn build(artists_router: Ports) -> Result<Self, String> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let homes = Self { prefix: format!("kinoflock-{}-{number}", std::process::id()) };
        for name in ["public", "router1", "router2", "artist", "maker"] {
            call("ip", &["netns", "add", &homes.name(name)])?;
            homes.ip(name, "link set lo up")?;
        }
        homes.ip("public", "addr add 198.18.0.1/32 dev lo")?;
        for (home, router, guest) in [(1, "router1", "artist"), (2, "router2", "maker")] {
            homes.link((router, "wan"), ("public", &format!("to{home}")))?;
            homes.link((router, "lan"), (guest, "lan"))?;
            homes.ip("public", &format!("addr add 198.18.{home}.1/30 dev to{home}"))?;
            homes.ip(router, &format!("addr add 198.18.{home}.2/30 dev wan"))?;
            homes.ip(router, &format!("addr add 192.168.{home}.1/24 dev lan"))?;
            homes.ip(guest, &format!("addr add 192.168.{home}.2/24 dev lan"))?;
            homes.ip(router, &format!("route add default via 198.18.{home}.1"))?;
            homes.ip(guest, &format!("route add default via 192.168.{home}.1"))?;
        }
        for name in ["public", "router1", "router2"] {
            homes.inside(name, &["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"])?;
        }
        homes.translate("router1", artists_router)?;
        homes.translate("router2", Ports::Kept)?;
        Ok(homes)
    }

    fn name(&self, short: &str) -> String {
        format!("{}-{short}", self.prefix)
    }

    fn inside(&self, name: &str, command: &[&str]) -> Result<(), String> {
        let name = self.name(name);
        let arguments: Vec<&str> = ["netns", "exec", &name].iter().chain(command).copied().collect();
        call("ip", &arguments)
    }

    fn ip(&self, name: &str, arguments: &str) -> Result<(), String> {
        let command: Vec<&str> = ["ip"].into_iter().chain(arguments.split(' ')).collect();
        self.inside(name, &command)
    }

    /// A cable between two interfaces, both up.
    fn link(&self, left: (&str, &str), right: (&str, &str)) -> Result<(), String> {
        let (left_name, right_name) = (self.name(left.0), self.name(right.0));
        let veth = ["link", "add", left.1, "netns", &left_name, "type", "veth", "peer", "name", right.1];
        let arguments: Vec<&str> = veth.iter().copied().chain(["netns", right_name.as_str()]).collect();
        call("ip", &arguments)?;
        self.ip(left.0, &format!("link set {} up", left.1))?;
        self.ip(right.0, &format!("link set {} up", right.1))
    }

    /// Makes a namespace a home router. What comes unasked is dropped before it is remembered, or it would take the
    /// port that a hole needs.
    fn translate(&self, router: &str, ports: Ports) -> Result<(), String> {
        let random = match ports {
            Ports::Kept => "",
            Ports::Random => "fully-random",
        };
        let rules = format!(
            "table ip home {{
                chain out {{ type nat hook postrouting priority 100; oifname \"wan\" masquerade {random}; }}
                chain through {{ type filter hook forward priority 0; policy drop;
                    iifname \"lan\" accept; ct state established,related accept; }}
                chain here {{ type filter hook input priority 0; policy accept;
                    iifname \"wan\" ct state new drop; }}
            }}"
        );
        self.inside(router, &["nft", &rules])
    }

    /// The command line that runs something in a namespace.
    fn wrapper(&self, name: &str) -> [String; 4] {
        ["ip".to_owned(), "netns".to_owned(), "exec".to_owned(), self.name(name)]
    }

    /// A client's command, run at the artist's home.
    fn run(&self, client: &Client, arguments: &[&str]) -> Output {
        let inner = client.command(arguments);
        let mut command = Command::new("timeout");
        command.arg(COMMAND_S).args(self.wrapper("artist")).arg(inner.get_program()).args(inner.get_args());
        command.current_dir(inner.get_current_dir().unwrap()).env("KINOFLOCK_LOG", LOG);
        for (name, value) in inner.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.output().unwrap()
    }
}

impl Drop for Homes {
    fn drop(&mut self) {
        for name in ["public", "router1", "router2", "artist", "maker"] {
            // One that was never made cannot be removed.
            let _ = call("ip", &["netns", "del", &self.name(name)]);
        }
    }
}

/// What clients log: the story of a connection and nothing of a prompt.
const LOG: &str = "kinoflock_net=debug,libp2p_dcutr=debug";

fn call(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output =
        Command::new(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))?;
    let told =
        format!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    if output.status.success() { Ok(()) } else { Err(told) }
}

/// The homes, or a word on why there are none here.
#[expect(clippy::print_stderr, reason = "who reads the results must know that this was not tried")]
fn homes(artists_router: Ports) -> Option<Homes> {
    match Homes::build(artists_router) {
        Ok(homes) => Some(homes),
        Err(why) => {
            eprintln!("SKIPPED: this system does not let a test make network namespaces with NAT: {why}");
            None
        }
    }
}

/// The public node, which carries others and takes no jobs, and the maker behind its router, known to the former by an
/// address over a relay.
fn nodes<'a>(sandbox: &'a mut Sandbox, homes: &Homes, engine: &[&str]) -> [&'a Node; 2] {
    let place = |node: &mut Node, name: &str, listen: &[&str], lines: &str| {
        let wrapper = homes.wrapper(name);
        node.wrap(&wrapper.each_ref().map(String::as_str));
        node.listen_on(listen);
        node.set_network(lines);
    };
    sandbox.add_prepared(&Worker::test(&[]), HELD_FOR_ALL, |node| {
        place(node, "public", &PUBLIC, "relay = \"on\"");
    });
    let paused = sandbox.nodes[0].command().arg("pause").output().unwrap();
    assert!(paused.status.success(), "{}", said(&paused));
    let known = format!("bootstrap = [{:?}]", sandbox.nodes[0].address("udp"));
    sandbox.add_prepared(&Worker::test(engine), "", |node| {
        place(node, "maker", &HOME, &known);
    });
    let [public, maker] = &sandbox.nodes[..] else { panic!("two nodes") };
    eventually("the maker learns that nobody gets in, and takes a place at the relay", || {
        maker.status().addresses.iter().any(|addr| addr.contains("/p2p-circuit/")).then_some(())
    });
    [public, maker]
}

/// What the client said, if it came to a clip.
fn generated(homes: &Homes, client: &Client, more: &[&str]) -> String {
    let plain = ["generate", PROMPT, "-o", "clip.mp4"];
    let arguments: Vec<&str> = plain.iter().chain(more).copied().collect();
    let output = homes.run(client, &arguments);
    assert!(output.status.success(), "{}", said(&output));
    said(&output)
}

fn punched(engine: &[&str], steps: &str) {
    let Some(homes) = homes(Ports::Kept) else { return };
    let mut sandbox = Sandbox::new();
    let client = sandbox.client("artist");
    let [public, maker] = nodes(&mut sandbox, &homes, engine);
    std::fs::write(client.path("start.safetensors"), vec![7; LARGE_INPUT]).unwrap();
    // The artist knows the public node only; that one tells of the maker.
    client.must(["join", &public.ticket()]);
    eventually("the public node knows the maker's advert", || {
        let output = homes.run(&client, &["nodes"]);
        said(&output).contains(&maker.local().node_id.short()).then_some(())
    });
    let input = ["--init-latents", "start.safetensors", "--steps", steps];
    let told = generated(&homes, &client, &input);
    assert!(told.contains("hole_punched") || maker.log().contains("hole_punched"), "{told}");
    invariants::delivered(&client.path("clip.mp4"), maker);
    invariants::discreet(maker, PROMPT);
    invariants::discreet(public, PROMPT);
}

#[test]
fn a_job_with_a_large_input_goes_between_two_homes_once_a_hole_is_punched() {
    punched(&["--step-ms", "500"], "10");
}

#[test]
#[ignore = "takes six minutes; `.ci/run --full` runs it"]
fn a_job_of_five_minutes_goes_between_two_homes() {
    punched(&["--step-ms", "8000"], "38");
}

#[test]
fn where_no_hole_can_be_punched_a_clip_comes_sealed_over_the_public_node() {
    let Some(homes) = homes(Ports::Random) else { return };
    let mut sandbox = Sandbox::new();
    let client = sandbox.client("artist");
    // Noise is more than a relay carries of a blob.
    let [public, maker] = nodes(&mut sandbox, &homes, &["--noise", "1"]);
    let ticket = eventually("the ticket leads over the relay", || relayed(maker));
    eventually("the maker knows the public node's advert", || (maker.known() == 1).then_some(()));
    let told = generated(&homes, &client, &["--node", &ticket, "--steps", "2", "--size", "256x256"]);
    assert!(told.contains("comes sealed over node"), "{told}");
    let len = std::fs::metadata(client.path("clip.mp4")).unwrap().len();
    assert!(len > kinoflock_net::limits::RELAYED_BLOB_BYTES, "{len} bytes go over a relay");
    assert!(!maker.log().contains("hole_punched"), "this router should not let that happen");
    invariants::delivered(&client.path("clip.mp4"), maker);
    eventually("nobody holds a copy once the artist has the clip", || {
        (public.status().held_bytes == 0).then_some(())
    });
    invariants::discreet(maker, PROMPT);
    invariants::discreet(public, PROMPT);
}

/// The maker's ticket, once it leads over the relay.
fn relayed(maker: &Node) -> Option<String> {
    let ticket = maker.ticket();
    let way: kinoflock_client::ticket::Way = ticket.parse().unwrap();
    let relayed = way.nodes()?.iter().flat_map(|(_, addrs)| addrs).any(kinoflock_net::peer::is_relayed);
    relayed.then_some(ticket)
}

#[test]
fn where_no_hole_can_be_punched_a_small_clip_comes_over_the_relay_and_a_large_input_goes_sealed() {
    let Some(homes) = homes(Ports::Random) else { return };
    let mut sandbox = Sandbox::new();
    let client = sandbox.client("artist");
    let [public, maker] = nodes(&mut sandbox, &homes, &["--step-ms", "100"]);
    let ticket = eventually("the ticket leads over the relay", || relayed(maker));
    generated(&homes, &client, &["--node", &ticket, "--steps", "10"]);
    invariants::delivered(&client.path("clip.mp4"), maker);
    assert!(!maker.log().contains("hole_punched"), "this router should not let that happen");
    std::fs::write(client.path("start.safetensors"), vec![7; LARGE_INPUT]).unwrap();
    let input = ["generate", PROMPT, "--node", &ticket, "--init-latents", "start.safetensors", "-o"];
    let output = homes.run(&client, &[&input[..], &["with.mp4", "--steps", "10"]].concat());
    assert!(output.status.success(), "{}", said(&output));
    assert!(said(&output).contains("your files go sealed over node"), "{}", said(&output));
    invariants::delivered(&client.path("with.mp4"), maker);
    eventually("nobody holds the input once the artist has the clip", || {
        (public.status().held_bytes == 0).then_some(())
    });
    // More than one stranger may put with the public node.
    std::fs::write(client.path("start.safetensors"), vec![8; TOO_LARGE_INPUT]).unwrap();
    let output = homes.run(&client, &[&input[..], &["no.mp4"]].concat());
    assert!(!output.status.success(), "{}", said(&output));
    assert!(said(&output).contains("over a relay only"), "{}", said(&output));
    assert!(!maker.log().contains("hole_punched"), "this router should not let that happen");
    invariants::discreet(maker, PROMPT);
    invariants::discreet(public, PROMPT);
}
