// swift-tools-version: 5.9

import PackageDescription

let swiftSettings: [SwiftSetting] = [.enableExperimentalFeature("StrictConcurrency")]

let package = Package(
    name: "TTTKit",
    platforms: [.iOS(.v16), .macOS(.v13)],
    products: [.library(name: "TTTKit", targets: ["TTTKit"])],
    targets: [
        .target(name: "TTTKit", swiftSettings: swiftSettings),
        .testTarget(name: "TTTKitTests", dependencies: ["TTTKit"], swiftSettings: swiftSettings),
    ]
)
