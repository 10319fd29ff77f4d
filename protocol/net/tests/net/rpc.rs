//! Requests and answers.

use std::time::Duration;

use futures::future::join_all;
use futures::{AsyncReadExt, AsyncWriteExt};
use kinoflock_net::{NetError, NetEvent, limits};
use kinoflock_protocol::frame;
use kinoflock_protocol::limits::{MAX_CONTROL_FRAME, MAX_ENVELOPE_BODY, MAX_NODES};
use kinoflock_protocol::names::Protocols;
use kinoflock_protocol::rpc::{Request, Response, decode_response, encode_request};
use kinoflock_protocol::{Bytes, List};

use crate::support::{Over, Raw, acknowledged, client_of, network, node, over_both, query};

over_both! {
    a_request_is_answered_by_the_owner_of_the_node => round_trip;
    two_hundred_requests_at_once_are_all_answered => many_requests;
    forty_clients_from_one_address_are_all_served => many_clients;
    a_dropped_responder_answers_busy => dropped_responder;
    above_the_limit_of_one_peer_a_request_hears_busy => busy_above_the_limit;
    an_owner_that_does_not_listen_answers_busy => deaf_owner;
    a_deadline_ends_the_wait => deadline;
    an_answer_over_the_limit_is_refused_and_the_peer_hears_busy => long_answer;
}

async fn round_trip(over: Over) {
    let mut node = node(over).await;
    let client = client_of(&node).await;
    let (id, from) = (node.id(), client.id());
    let asking = tokio::spawn(async move { client.net.request(id, Request::Capacity).await });
    let answered = node.wait_for(|event| match event {
        NetEvent::Request { node, request, responder, addr } => {
            assert_eq!(node, from);
            assert_eq!(*request, Request::Capacity);
            assert!(addr.unwrap().to_string().starts_with("/ip4/127.0.0.1/"));
            assert!(responder.is_open());
            Some(responder.send(Response::Acknowledged))
        }
        _ => None,
    });
    answered.await.unwrap();
    assert_eq!(asking.await.unwrap().unwrap(), Response::Acknowledged);
}

async fn many_requests(over: Over) {
    let node = node(over).await;
    let client = client_of(&node).await;
    let id = node.id();
    let _node = node.acknowledging();
    join_all((0..200).map(|_| acknowledged(&client.net, id))).await;
}

async fn many_clients(over: Over) {
    let node = node(over).await;
    let clients = join_all((0..40).map(|_| client_of(&node))).await;
    let id = node.id();
    let _node = node.acknowledging();
    join_all(clients.iter().map(|client| acknowledged(&client.net, id))).await;
}

async fn dropped_responder(over: Over) {
    let mut node = node(over).await;
    let client = client_of(&node).await;
    let id = node.id();
    let asking = tokio::spawn(async move { client.net.request(id, Request::Capacity).await });
    node.wait_for(|event| matches!(event, NetEvent::Request { .. }).then_some(())).await;
    assert!(matches!(asking.await.unwrap().unwrap(), Response::Busy { .. }));
}

async fn busy_above_the_limit(over: Over) {
    let mut node = node(over).await;
    let raw = Raw::connect(&node.addr()).await;
    let control = Protocols::of(&network()).control;
    let framed = frame::frame(&encode_request(&Request::Capacity), MAX_CONTROL_FRAME).unwrap();
    let limit = limits::INBOUND_REQUESTS_PER_PEER;
    let mut held = Vec::new();
    let mut streams = Vec::new();
    for _ in 0..limit {
        let mut stream = raw.open(&control).await.unwrap();
        stream.write_all(&framed).await.unwrap();
        stream.flush().await.unwrap();
        streams.push(stream);
        held.push(
            node.wait_for(|event| match event {
                NetEvent::Request { responder, .. } => Some(responder),
                _ => None,
            })
            .await,
        );
    }
    let mut one_more = raw.open(&control).await.unwrap();
    one_more.write_all(&framed).await.unwrap();
    one_more.flush().await.unwrap();
    let mut answer = Vec::new();
    one_more.read_to_end(&mut answer).await.unwrap();
    assert!(matches!(decode_response(&answer[4..]).unwrap(), Response::Busy { .. }));
    held.pop().unwrap().send(Response::Acknowledged).unwrap();
    let mut answer = Vec::new();
    streams.pop().unwrap().read_to_end(&mut answer).await.unwrap();
    assert_eq!(decode_response(&answer[4..]).unwrap(), Response::Acknowledged);
}

async fn deaf_owner(over: Over) {
    let node = node(over).await;
    let client = client_of(&node).await;
    let id = node.id();
    drop(node.events);
    let response = client.net.request(id, Request::Capacity).await.unwrap();
    assert!(matches!(response, Response::Busy { .. }), "got {response:?}");
}

async fn deadline(over: Over) {
    let mut node = node(over).await;
    let client = client_of(&node).await;
    let id = node.id();
    let short = Duration::from_millis(300);
    let asking = tokio::spawn(async move { client.net.request_within(id, Request::Capacity, short).await });
    let held = node.wait_for(|event| match event {
        NetEvent::Request { responder, .. } => Some(responder),
        _ => None,
    });
    let held = held.await;
    let error = asking.await.unwrap().unwrap_err();
    assert!(matches!(error, NetError::TimedOut { limit_ms: 300, .. }), "got {error}");
    drop(held);
}

async fn long_answer(over: Over) {
    let mut node = node(over).await;
    let client = client_of(&node).await;
    let id = node.id();
    let mut envelope = query(id);
    envelope.body = Bytes::new(vec![0; MAX_ENVELOPE_BODY]).unwrap();
    let long = Response::Nodes(List::new(vec![envelope; MAX_NODES]).unwrap());
    let asking = tokio::spawn(async move { client.net.request(id, Request::Capacity).await });
    let responder = node.wait_for(|event| match event {
        NetEvent::Request { responder, .. } => Some(responder),
        _ => None,
    });
    let error = responder.await.send(long).unwrap_err();
    assert!(matches!(error, NetError::TooLong { limit: MAX_CONTROL_FRAME, .. }), "got {error}");
    assert!(matches!(asking.await.unwrap().unwrap(), Response::Busy { .. }));
}
