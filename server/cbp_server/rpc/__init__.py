"""gRPC at the edge: conversion, servicers, interceptors. No decisions about learners are made here."""
