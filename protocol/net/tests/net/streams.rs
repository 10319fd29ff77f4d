//! Progress streams: many at once, taken up again, refused, given up.

use std::time::Duration;

use futures::future::join_all;
use futures::{AsyncReadExt, AsyncWriteExt};
use kinoflock_net::{NetError, NetEvent, ProgressSender, ProgressSink, limits};
use kinoflock_protocol::limits::MAX_OPEN_FRAME;
use kinoflock_protocol::names::Protocols;
use kinoflock_protocol::progress::{JobEvent, ProgressFrame, ProgressOpen};
use kinoflock_protocol::rpc::{Request, Response, decode_stream, encode_stream};
use kinoflock_protocol::{Reason, Refusal, frame};

use crate::support::{Over, Peer, Raw, client_of, event, network, node, over_both, query};

over_both! {
    two_hundred_and_fifty_six_streams_at_once_while_control_and_identify_go_on => all_at_once;
    more_streams_than_the_limit_hear_busy_and_the_connection_lives => above_the_limit;
    a_broken_stream_is_taken_up_again_from_the_next_event => taken_up_again;
    a_refusal_is_told_with_its_reason => refused;
    an_owner_that_drops_the_question_is_busy => dropped_question;
    a_node_learns_that_its_follower_has_gone => follower_gone;
}

async fn sink(node: &mut Peer) -> (u64, ProgressSink) {
    node.wait_for(|event| match event {
        NetEvent::Progress { from_seq, sink, .. } => Some((from_seq, sink)),
        _ => None,
    })
    .await
}

/// Accepts so many followers, answering requests on the way; gives the senders.
async fn accept(node: &mut Peer, count: usize) -> Vec<ProgressSender> {
    let mut senders = Vec::new();
    while senders.len() < count {
        match node.events.recv().await.unwrap() {
            NetEvent::Progress { sink, .. } => senders.push(sink.accept()),
            NetEvent::Request { responder, .. } => responder.send(Response::Acknowledged).unwrap(),
            NetEvent::Disconnected { .. } => panic!("the connection must live"),
            _ => {}
        }
    }
    senders
}

async fn all_at_once(over: Over) {
    const MANY: usize = limits::OUTBOUND_STREAMS_PER_PEER;
    let mut node = node(over).await;
    let mut client = client_of(&node).await;
    let id = node.id();
    let question = query(id);
    let serving = tokio::spawn(async move {
        let senders = accept(&mut node, MANY).await;
        (node, senders)
    });
    let asking = {
        let net = client.net.clone();
        tokio::spawn(async move {
            for _ in 0..20 {
                let response = net.request(id, Request::Capacity).await.unwrap();
                assert_eq!(response, Response::Acknowledged);
                assert_eq!(net.peer_info(id).await.unwrap().node, id);
            }
        })
    };
    let opening = (0..MANY).map(|_| client.net.open_progress(id, question.clone(), 0));
    let mut streams: Vec<_> = join_all(opening).await.into_iter().map(Result::unwrap).collect();
    let (node, senders) = serving.await.unwrap();
    // All are open at this moment; only now anything is said on them.
    let node = node.acknowledging();
    asking.await.unwrap();
    for sender in &senders {
        sender.send(event(0, JobEvent::Loading)).await.unwrap();
        sender.send(event(1, JobEvent::Cancelled)).await.unwrap();
    }
    for stream in &mut streams {
        assert_eq!(stream.next().await.unwrap().unwrap().event, JobEvent::Loading);
        assert_eq!(stream.next().await.unwrap().unwrap().event, JobEvent::Cancelled);
        assert!(stream.next().await.is_none());
    }
    drop(streams);
    assert_eq!(client.net.request(id, Request::Capacity).await.unwrap(), Response::Acknowledged);
    assert_eq!(client.net.peers().await.unwrap().len(), 1);
    while let Ok(event) = client.events.try_recv() {
        assert!(!matches!(event, NetEvent::Disconnected { .. }), "the connection must live");
    }
    drop(node);
}

async fn above_the_limit(over: Over) {
    const EXTRA: usize = 40;
    let mut node = node(over).await;
    let mut raw = Raw::connect(&node.addr()).await;
    let protocol = Protocols::of(&network()).progress;
    let open = encode_stream(&ProgressOpen { query: query(node.id()), from_seq: 0 });
    let open = frame::frame(&open, MAX_OPEN_FRAME).unwrap();
    let mut held = Vec::new();
    let mut senders = Vec::new();
    for _ in 0..limits::INBOUND_STREAMS_PER_PEER {
        let mut stream = raw.open(&protocol).await.unwrap();
        stream.write_all(&open).await.unwrap();
        stream.flush().await.unwrap();
        held.push(stream);
        senders.push(sink(&mut node).await.1.accept());
    }
    for _ in 0..EXTRA {
        let mut stream = raw.open(&protocol).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        let answer: ProgressFrame = decode_stream(&answer[4..]).unwrap();
        assert!(matches!(answer, ProgressFrame::Busy { .. }), "got {answer:?}");
    }
    let honest = client_of(&node).await;
    let id = node.id();
    let followed = tokio::spawn(async move { honest.net.open_progress(id, query(id), 0).await });
    let sender = sink(&mut node).await.1.accept();
    assert!(followed.await.unwrap().is_ok(), "one peer's flood must not cost another its stream");
    drop(sender);
    assert!(raw.closed.try_recv().is_err(), "the connection must live");
}

async fn taken_up_again(over: Over) {
    let mut node = node(over).await;
    let client = client_of(&node).await;
    let id = node.id();
    let net = client.net.clone();
    let following = tokio::spawn(async move {
        let mut stream = net.open_progress(id, query(id), 0).await.unwrap();
        assert_eq!(stream.next().await.unwrap().unwrap().seq, 0);
        let error = stream.next().await.unwrap().unwrap_err();
        assert!(matches!(error, NetError::ConnectionLost { .. }), "got {error}");
        assert!(stream.next().await.is_none());
        let mut again = net.open_progress(id, query(id), 1).await.unwrap();
        assert_eq!(again.next().await.unwrap().unwrap().seq, 1);
        assert_eq!(again.next().await.unwrap().unwrap().event, JobEvent::Cancelled);
        assert!(again.next().await.is_none());
    });
    let (from, first) = sink(&mut node).await;
    assert_eq!(from, 0);
    let sender = first.accept();
    sender.send(event(0, JobEvent::Loading)).await.unwrap();
    drop(sender);
    let (from, second) = sink(&mut node).await;
    assert_eq!(from, 1);
    let sender = second.accept();
    sender.send(event(1, JobEvent::Encoding)).await.unwrap();
    sender.send(event(2, JobEvent::Cancelled)).await.unwrap();
    following.await.unwrap();
}

async fn refused(over: Over) {
    let mut node = node(over).await;
    let client = client_of(&node).await;
    let id = node.id();
    let following = tokio::spawn(async move { client.net.open_progress(id, query(id), 0).await });
    sink(&mut node).await.1.refuse(Refusal::new(Reason::Paused, "paused"));
    match following.await.unwrap().unwrap_err() {
        NetError::Refused { node, refusal } => {
            assert_eq!(node, id);
            assert_eq!(refusal.reason, Reason::Paused);
        }
        other => panic!("got {other}"),
    }
}

async fn dropped_question(over: Over) {
    let mut node = node(over).await;
    let client = client_of(&node).await;
    let id = node.id();
    let following = tokio::spawn(async move { client.net.open_progress(id, query(id), 0).await });
    drop(sink(&mut node).await);
    let error = following.await.unwrap().unwrap_err();
    assert!(matches!(error, NetError::Busy { .. }), "got {error}");
}

async fn follower_gone(over: Over) {
    let mut node = node(over).await;
    let client = client_of(&node).await;
    let id = node.id();
    let following = tokio::spawn(async move {
        let stream = client.net.open_progress(id, query(id), 0).await.unwrap();
        drop(stream);
        client
    });
    let sender = sink(&mut node).await.1.accept();
    let _client = following.await.unwrap();
    tokio::time::timeout(Duration::from_secs(20), sender.closed()).await.expect("the sender learns it");
    assert!(sender.send(event(0, JobEvent::Loading)).await.is_err());
}
